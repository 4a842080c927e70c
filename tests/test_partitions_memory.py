"""State bytes as reported against those the optimizers really create."""

import pytest
import torch
import transformers as hf

import fusedopt
from fusedopt.partitions import adam_mini, state_bytes


def gpt2(**options):
    small = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**small, **options}))


def created(optimizer):
    """Bytes of all state tensors' elements after a step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    return sum(x.numel() * x.itemsize for state in optimizer.state.values() for x in state.values())


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_reported_bytes_are_those_created(state_dtype):
    model = gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    model.transformer.h[0].double()
    partition = adam_mini(model)
    reported = state_bytes(model, state_dtype=state_dtype)
    assert reported == state_bytes(model, partition, state_dtype=state_dtype)
    optim = fusedopt.optim
    adamw = optim.AdamW(model.parameters(), state_dtype=state_dtype)
    assert reported["AdamW"] == created(adamw)
    if hasattr(optim, "BlockwiseAdam"):
        blockwise = optim.BlockwiseAdam(
            model.named_parameters(), partition=partition, state_dtype=state_dtype
        )
        assert reported["BlockwiseAdam"] == created(blockwise)


def test_gpt2_small_keeps_half():
    with torch.device("meta"):
        model = hf.GPT2LMHeadModel(hf.GPT2Config())
    reported = state_bytes(model)
    assert reported["BlockwiseAdam"] <= 0.51 * reported["AdamW"]
    assert str(reported).splitlines()[1].startswith("BlockwiseAdam")
    one_each = state_bytes(model, "coordinate")
    assert one_each["BlockwiseAdam"] == one_each["AdamW"]


def test_a_parameter_without_partition_is_named():
    with pytest.raises(ValueError, match=r"no entry for parameter 'transformer\.wte\.weight'"):
        state_bytes(gpt2(), {"lm_head.weight": "row"})
