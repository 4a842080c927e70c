"""`fusedopt.param_groups_for`: which parameters of real architectures Muon gets."""

import pytest
import torch
import transformers as hf
from torch import nn

from fusedopt import param_groups_for, partitions
from fusedopt.optim import Muon, NorMuon
from fusedopt.partitions import Each, Heads, Transposed

LLAMA = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
MOE = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
TOKENS = torch.arange(12).reshape(2, 6) * 7 % 50


def sorted_out(model, **options):
    """{name: partition} of Muon's parameters, and the names of AdamW's."""
    names = {p: name for name, p in model.named_parameters()}
    muon, others = {}, set()
    for group in param_groups_for(model, **options):
        if group["algorithm"] == "muon":
            muon = {names[p]: group["partition"][p] for p in group["params"]}
        else:
            others = {names[p] for p in group["params"]}
    assert not set(muon) & others
    assert {*muon, *others} == {n for n, p in model.named_parameters() if p.requires_grad}
    return muon, others


def ends(names):
    """What names end in, layers and stacks left out."""
    return {".".join(n.split(".")[-2:]) for n in names}


def slices(kind):
    return partitions.parse(
        [(slice(0, 32), kind), (slice(32, 64), kind), (slice(64, 96), "tensor")]
    )


def test_gpt2():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))
    muon, others = sorted_out(model)
    assert ends(muon) == {"c_attn.weight", "c_proj.weight", "c_fc.weight"}
    assert len(muon) == 8
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= others
    assert muon["transformer.h.0.attn.c_attn.weight"] == Transposed(slices("tensor"))
    assert muon["transformer.h.0.mlp.c_fc.weight"] == Transposed("tensor")
    heads, _ = sorted_out(model, split="heads")
    assert heads["transformer.h.0.attn.c_attn.weight"] == Transposed(slices(Heads(n=4)))
    whole, _ = sorted_out(model, split="none")
    assert set(whole.values()) == {Transposed("tensor")}


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    muon, others = sorted_out(model)
    assert len(muon) == 2 * 7
    assert set(muon.values()) == {"tensor"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}
    norms = {n for n in ends(others) if "norm" in n}
    assert len(norms) == 3
    rest = {n for n in others if "norm" not in n}
    assert rest == {"model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))}
    heads, _ = sorted_out(model, split="heads")
    layer = "model.layers.0.self_attn."
    assert heads[layer + "q_proj.weight"] == Heads(n=4)
    assert heads[layer + "k_proj.weight"] == Heads(n=2)
    assert heads[layer + "v_proj.weight"] == heads[layer + "o_proj.weight"] == "tensor"


def test_mixture_of_experts():
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**MOE))
    muon, others = sorted_out(model)
    banks = {name: kind for name, kind in muon.items() if "experts" in name}
    assert banks and all(
        kind == (Each("tensor") if dict(model.named_parameters())[name].ndim == 3 else "tensor")
        for name, kind in banks.items()
    )
    assert any("gate" in name for name in muon)
    assert {n for n in others if "norm" not in n} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_torchs_encoder_and_a_head():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(50, 32),
            "encoder": nn.TransformerEncoder(layer, 2),
            "head": nn.Linear(32, 50, bias=False),
        }
    )
    muon, others = sorted_out(model)
    assert ends(muon) == {
        "self_attn.in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight",
    }  # fmt: skip
    assert muon["encoder.layers.0.self_attn.in_proj_weight"] == slices("tensor")
    assert {"embed.weight", "head.weight"} <= others
    assert all("weight" not in n or "norm" in n for n in others - {"embed.weight", "head.weight"})


def test_a_model_that_is_a_layer():
    muon, others = sorted_out(nn.Linear(4, 4))
    assert muon == {"weight": "tensor"} and others == {"bias"}


def test_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),  # depthwise
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ConvTranspose2d(12, 6, 2),
        nn.Conv1d(6, 4, 1),
    )
    muon, others = sorted_out(model)
    assert muon == {"0.weight": "tensor", "3.weight": Heads(n=2), "4.weight": "tensor",
                    "5.weight": "tensor"}  # fmt: skip
    assert "2.weight" in others
    overridden, _ = sorted_out(model, overrides={"0.weight": "adamw", "2.*ight": "muon"})
    assert "0.weight" not in overridden
    assert overridden["2.weight"] == "tensor"


def test_vectors_frozen_ones_and_bare_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
            self.scale = nn.Parameter(torch.zeros(8))
            self.hidden = nn.Linear(8, 8)
            self.frozen = nn.Linear(8, 8).requires_grad_(False)

    muon, others = sorted_out(Model())
    assert set(muon) == {"hidden.weight"}
    assert others == {"cls_token", "pos_embed", "scale", "hidden.bias"}


def test_what_is_unknown_is_asked_for():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing = nn.Parameter(torch.zeros(4, 6))

    model = nn.ModuleList([Odd(), Odd()])
    with pytest.raises(ValueError, match=r"2 parameters(.|\n)*mixing \[2 of them\].*Odd is not kn"):
        param_groups_for(model)
    muon, _ = sorted_out(model, overrides={"*.mixing": "muon"})
    assert set(muon) == {"0.mixing", "1.mixing"}
    with pytest.raises(ValueError, match=r"overrides \['x'\] match no parameter"):
        param_groups_for(model, overrides={"*.mixing": "adamw", "x": "muon"})
    with pytest.raises(ValueError, match=r"overrides.*does not cut matrices"):
        param_groups_for(model, overrides={"*.mixing": "row"})
    with pytest.raises(ValueError, match="split is 'x'"):
        param_groups_for(model, split="x")


@pytest.mark.parametrize("split", ["none", "fused", "heads"])
@pytest.mark.parametrize("cls", [Muon, NorMuon])
@pytest.mark.parametrize(
    ("model", "config", "options"),
    [
        (hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
        (hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA),
        (hf.MixtralForCausalLM, hf.MixtralConfig, MOE),
    ],
)
def test_one_optimizer_trains_a_model(model, config, options, cls, split):
    torch.manual_seed(0)
    model = model(config(**options))
    groups = param_groups_for(model, split=split, adamw={"lr": 3e-3}, muon={"lr": 0.02})
    optimizer = cls(groups)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    again = cls(param_groups_for(model, split=split))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.02
    assert again.param_groups[1]["lr"] == 3e-3
