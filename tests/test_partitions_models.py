"""Adam-mini's partitions of real architectures, checked against what their forward passes do.

The judge of a head is the model: noise in one block of a projection must change the output of one
attention head (all heads of one group for a key) and nothing else of that layer, noise in a row of
the values one coordinate of each head that shares it.
"""

import collections

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from fusedopt.partitions import Heads, adam_mini, block_ids, resolve

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GQA = {**SMALL, "num_key_value_heads": 2}
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
FALCON = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
MLA = {
    **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4},
    **{"v_head_dim": 5, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 2},
    **{"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    **{"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 2, "max_position_embeddings": 16},
}
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}

SEPARATE = ("q_proj", "k_proj", "v_proj")


class NanoAttention(nn.Module):
    """nanoGPT's, written anew: queries, keys and values from one ``nn.Linear``."""

    def __init__(self, name, heads_name):
        super().__init__()
        setattr(self, name, nn.Linear(32, 96))
        setattr(self, heads_name, 4)
        self.c_proj = nn.Linear(32, 32)
        self.fused = name

    def forward(self, x):
        q, k, v = getattr(self, self.fused)(x).split(32, dim=2)
        q, k, v = (t.view(*x.shape[:2], 4, 8).transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class MetaAttention(nn.Module):
    """As in Meta's Llama: the attention module itself says little, the model's args the rest."""

    def __init__(self):
        super().__init__()
        self.head_dim = 8
        self.wq, self.wo = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.wk, self.wv = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x):
        q, k, v = (
            w(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attn, self.norm, self.mlp = attention, nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x):
        return self.mlp(x + self.attn(self.norm(x)))


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TOKENS = {"input_ids": torch.arange(6)[None] * 7 % 50}
PAIRS = {**TOKENS, "decoder_input_ids": torch.arange(5)[None] * 3 % 50}
PIXELS = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
VECTORS = {"x": torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))}


def case(name, build, inputs, layer, weights, output, heads=4, groups=None):
    """``layer`` holds the weights; ``output``, beside them, takes the heads' joined outputs."""
    return pytest.param(build, inputs, layer, weights, output, heads, groups or heads, id=name)


def decoder(name, model, config, options, weights=SEPARATE, output="o_proj", groups=2):
    layer = "model.layers.0.self_attn"
    build = lambda: getattr(hf, model)(getattr(hf, config)(**options))  # noqa: E731
    return case(name, build, TOKENS, layer, weights, output, groups=groups)


def falcon(name, groups, **options):
    build = lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON, **options))  # noqa: E731
    return case(
        name, build, TOKENS, "transformer.h.0.self_attention", ["query_key_value"], "dense",
        groups=groups,
    )  # fmt: skip


def gpt(name, model, config, weight, output, groups=None, **options):
    build = lambda: getattr(hf, model)(getattr(hf, config)(**GPT, **options))  # noqa: E731
    return case(name, build, TOKENS, "transformer.h.0.attn", [weight], output, groups=groups)


ATTENTION = [
    gpt("GPT-2", "GPT2LMHeadModel", "GPT2Config", "c_attn", "c_proj"),
    gpt("GPTBigCode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", "c_attn", "c_proj", 1),
    gpt(
        "GPTBigCode, keys by head", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", "c_attn", "c_proj",
        multi_query=False,
    ),
    gpt("CodeGen", "CodeGenForCausalLM", "CodeGenConfig", "qkv_proj", "out_proj", rotary_dim=4),
    decoder("Llama", "LlamaForCausalLM", "LlamaConfig", GQA),
    decoder("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 16}),
    decoder(
        "Gemma", "GemmaForCausalLM", "GemmaConfig",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 16}, groups=1,
    ),
    decoder("Mixtral", "MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
    decoder("GPT-OSS", "GptOssForCausalLM", "GptOssConfig",
            {**GQA, "head_dim": 8, "num_local_experts": 4}),
    decoder("Phi-3", "Phi3ForCausalLM", "Phi3Config", {**GQA, "pad_token_id": 0}, ["qkv_proj"]),
    decoder(
        "DeepSeek-V3", "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**SMALL, "num_key_value_heads": 4, **MLA}, ["q_b_proj", "kv_b_proj"], groups=4,
    ),
    falcon("Falcon", 1),
    falcon("Falcon, new architecture", 2, new_decoder_architecture=True, num_kv_heads=2),
    falcon("Falcon, keys by head", 4, multi_query=False),
    case("Bloom", lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=32,
         n_layer=2, n_head=4)), TOKENS, "transformer.h.0.self_attention", ["query_key_value"],
         "dense"),
    case("GPT-NeoX", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)), TOKENS,
         "gpt_neox.layers.0.attention", ["query_key_value"], "dense"),
    case("GPT-NeoX Japanese", lambda: hf.GPTNeoXJapaneseForCausalLM(hf.GPTNeoXJapaneseConfig(
         **FALCON)), TOKENS, "gpt_neox_japanese.layers.0.attention", ["query_key_value"], "dense"),
    case("Persimmon", lambda: hf.PersimmonForCausalLM(hf.PersimmonConfig(**SMALL)), TOKENS,
         "model.layers.0.self_attn", ["query_key_value"], "dense"),
    case("DeBERTa", lambda: hf.DebertaModel(hf.DebertaConfig(**SMALL)), TOKENS,
         "encoder.layer.0.attention", ["self.in_proj"], "output.dense"),
    case("MPT", lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=50, d_model=32, n_heads=4,
         n_layers=1)), TOKENS, "transformer.blocks.0.attn", ["Wqkv"], "out_proj"),
    case("BERT", lambda: hf.BertModel(hf.BertConfig(**SMALL)), TOKENS,
         "encoder.layer.0.attention", ["self.query", "self.key", "self.value"], "output.dense"),
    case("T5 encoder", lambda: hf.T5Model(hf.T5Config(**T5)), PAIRS,
         "encoder.block.0.layer.0.SelfAttention", ["q", "k", "v"], "o"),
    case("T5 cross-attention", lambda: hf.T5Model(hf.T5Config(**T5)), PAIRS,
         "decoder.block.0.layer.1.EncDecAttention", ["q", "k", "v"], "o"),
    case("BART encoder", lambda: hf.BartModel(hf.BartConfig(**BART)), PAIRS,
         "encoder.layers.0.self_attn", SEPARATE, "out_proj"),
    case("BART decoder", lambda: hf.BartModel(hf.BartConfig(**BART)), PAIRS,
         "decoder.layers.0.encoder_attn", SEPARATE, "out_proj", 2),
    case("ViT", lambda: hf.ViTModel(hf.ViTConfig(**CLIP, num_attention_heads=4, image_size=16,
         patch_size=8)), PIXELS, "layers.0.attention", SEPARATE, "o_proj"),
    case("nanoGPT", lambda: Block(NanoAttention("c_attn", "n_head")), VECTORS,
         "attn", ["c_attn"], "c_proj"),
    case("timm", lambda: Block(NanoAttention("qkv", "num_heads")), VECTORS,
         "attn", ["qkv"], "c_proj"),
    case("Llama of Meta", lambda: Block(MetaAttention()), VECTORS,
         "attn", ["wq", "wk", "wv"], "wo", groups=2),
]  # fmt: skip


class Seen(Exception):  # noqa: N818
    """Carries what was waited for out of a forward pass, whose rest nobody needs."""


def joined_heads(model, inputs, output):
    """What enters the projection behind the heads, as (tokens, coordinates)."""

    def stop(_, args):
        raise Seen(args[0].detach())

    hook = output.register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(Seen) as seen:
        model(**inputs)
    hook.remove()
    joined = seen.value.args[0]
    return joined.reshape(-1, joined.shape[-1])


def changes(run, weights, partition):
    """For each block of these weights, the set of the heads' coordinates that noise in it moves."""
    rng = torch.Generator().manual_seed(1)
    before = run()
    result = collections.Counter()
    for name, weight in weights.items():
        ids = torch.from_numpy(block_ids(partition[name], weight.shape))
        for block in range(int(ids.max()) + 1):
            kept = weight.detach().clone()
            noise = torch.randn(weight.shape, generator=rng, dtype=weight.dtype)
            weight.data += torch.where(ids == block, noise, 0.0)
            moved = (run() - before).abs().amax(0) > 1e-9
            result[tuple(moved.nonzero().flatten().tolist())] += 1
            weight.data.copy_(kept)
    return result


def expected(heads, groups, width):
    """Each head moved once by its queries and each group by its keys; values one by one."""
    size = width // heads
    of_head = [tuple(range(h * size, (h + 1) * size)) for h in range(heads)]
    share = heads // groups
    result = collections.Counter(of_head)
    for j in range(groups):
        members = of_head[j * share : (j + 1) * share]
        result[sum(members, ())] += 1
        result.update(zip(*members, strict=True))
    return result


def loud(model, weights):
    """In float64, with projections large enough that every head has something to say."""
    model.double().eval()
    rng = torch.Generator().manual_seed(2)
    for weight in weights.values():
        weight.data = torch.randn(weight.shape, generator=rng, dtype=torch.float64) / 4
    return model


@pytest.mark.parametrize(
    ("build", "inputs", "layer", "names", "output", "heads", "groups"), ATTENTION
)
def test_blocks_are_heads(build, inputs, layer, names, output, heads, groups):
    torch.manual_seed(0)
    model = build()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    names = [f"{layer}.{name}.weight" for name in names]
    weights = {name: model.get_parameter(name) for name in names}
    partition = adam_mini(model)
    assert list(partition) == [name for name, _ in model.named_parameters()]
    loud(model, weights)
    behind = model.get_submodule(f"{layer}.{output}")
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    run = lambda: joined_heads(model, inputs, behind)  # noqa: E731
    assert changes(run, weights, partition) == expected(heads, groups, run().shape[1])


@pytest.mark.parametrize("dims", [{}, {"kdim": 20, "vdim": 12}], ids=["one width", "kdim, vdim"])
def test_blocks_are_heads_of_torch_attention(dims):
    """``nn.MultiheadAttention``, its output projection replaced by the identity."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True, **dims)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if dims else ["in_proj_weight"]
    weights = {name: module.get_parameter(name) for name in names}
    partition = adam_mini(module)
    loud(module, weights)
    module.out_proj.weight.data = torch.eye(32, dtype=torch.float64)
    sizes = (32, dims.get("kdim", 32), dims.get("vdim", 32))
    inputs = [torch.randn(1, 5, size, dtype=torch.float64) for size in sizes]
    run = lambda: module(*inputs)[0].detach().reshape(-1, 32)  # noqa: E731
    assert changes(run, weights, partition) == expected(4, 4, 32)
    assert partition["out_proj.weight"] == "row"
    assert {partition[n] for n in ("in_proj_bias", "bias_k", "bias_v", "out_proj.bias")} == {
        "coordinate"
    }


def test_the_check_sees_a_wrong_partition():
    """Thirds for rows interleaved by head: what a classifier by name alone would say."""
    torch.manual_seed(0)
    model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL))
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    weights = {name: model.get_parameter(name)}
    loud(model, weights)
    run = lambda: joined_heads(model, TOKENS, model.gpt_neox.layers[0].attention.dense)  # noqa: E731
    parts = [(slice(0, 32), Heads(4)), (slice(32, 64), Heads(4)), (slice(64, 96), "row")]
    assert changes(run, weights, {name: parts}) != expected(4, 4, 32)


def neurons(partition, shape, axis):
    """Whether blocks are exactly the slices along ``axis`` (and expert, along axis 0 of a bank)."""
    ids = np.moveaxis(block_ids(partition, shape), axis, -1)
    lead = (
        ids.reshape(shape[0], -1, shape[axis])
        if len(shape) == 3
        else ids.reshape(1, -1, shape[axis])
    )
    return bool((lead == lead[:, :1]).all()) and len(np.unique(ids)) == lead.shape[0] * shape[axis]


@pytest.mark.parametrize(
    ("build", "axes"),
    [
        (
            lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GQA, num_local_experts=4)),
            {"mlp.experts.gate_up_proj": 1, "mlp.experts.down_proj": 1, "mlp.gate.weight": 0},
        ),
        (
            lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**GQA, head_dim=8, num_local_experts=4)),
            {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 2, "mlp.router.weight": 0},
        ),
        (
            lambda: hf.Qwen2MoeForCausalLM(
                hf.Qwen2MoeConfig(**GQA, num_experts=4, moe_intermediate_size=24,
                                  shared_expert_intermediate_size=24)
            ),
            {"mlp.experts.gate_up_proj": 1, "mlp.experts.down_proj": 1, "mlp.gate.weight": 0,
             "mlp.shared_expert.up_proj.weight": 0},
        ),
        (
            lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GQA, pad_token_id=0)),
            {"mlp.gate_up_proj.weight": 0, "mlp.down_proj.weight": 0, "self_attn.o_proj.weight": 0},
        ),
    ],
    ids=["Mixtral", "GPT-OSS", "Qwen2-MoE", "Phi-3"],
)  # fmt: skip
def test_experts_and_mlps_by_output_neuron(build, axes):
    model = build()
    partition = adam_mini(model)
    for name, axis in axes.items():
        name = f"model.layers.0.{name}"
        assert neurons(partition[name], model.get_parameter(name).shape, axis), name


def test_gpt2():
    """Weights stored (inputs, outputs), and a head tied to the embedding."""
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT))
    partition = adam_mini(model)
    assert "lm_head.weight" not in partition
    assert partition["transformer.wte.weight"] == partition["transformer.wpe.weight"] == "row"
    assert partition["transformer.ln_f.weight"] == "tensor"
    assert partition["transformer.ln_f.bias"] == "coordinate"
    assert partition["transformer.h.0.attn.c_attn.bias"] == "coordinate"
    for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.1.{name}.weight"
        assert neurons(partition[name], model.get_parameter(name).shape, 1), name


def test_norms_sinks_and_tokens():
    partition = adam_mini(
        hf.GptOssForCausalLM(hf.GptOssConfig(**GQA, head_dim=8, num_local_experts=4))
    )
    layer = "model.layers.0."
    assert partition[layer + "input_layernorm.weight"] == "tensor"
    assert partition[layer + "self_attn.sinks"] == "coordinate"  # one logit a head
    assert partition[layer + "mlp.experts.gate_up_proj_bias"] == "coordinate"
    model = hf.ViTModel(hf.ViTConfig(**CLIP, num_attention_heads=4, image_size=16, patch_size=8))
    partition = adam_mini(model)
    shape = model.embeddings.position_embeddings.shape
    ids = block_ids(partition["embeddings.position_embeddings"], shape)
    assert (ids[0] == np.arange(shape[1])[:, None]).all()
    assert partition["embeddings.patch_embeddings.projection.weight"] == "row"


def test_a_config_that_holds_lists_or_refuses():
    """As RF-DETR's, whose ``num_features`` is a list, and those whose values differ by layer."""

    class Config:
        def __init__(self):
            self.num_features, self.hidden_size = [8, 16], 32

        @property
        def num_key_value_heads(self):
            raise RuntimeError("differs by layer")

    model = attention(q_proj=linear(32), k_proj=linear(32), num_heads=4)
    model.config = Config()
    model.mask_token = nn.Parameter(torch.ones(1, 3, 32))
    ids = block_ids(adam_mini(model)["mask_token"], (1, 3, 32))
    assert ids[0, :, 0].tolist() == [0, 1, 2]
    assert adam_mini(model)["k_proj.weight"] == Heads(4)


def test_torch_transformers():
    for model in (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48), 2, enable_nested_tensor=False),
        nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48), 2),
        nn.Transformer(32, 4, 1, 1, 48),
    ):
        partition = adam_mini(model)
        for name, parameter in model.named_parameters():
            blocks = len(np.unique(block_ids(partition[name], parameter.shape)))
            if name.endswith("in_proj_weight"):
                assert blocks == 4 + 4 + 32
            elif name.endswith("bias"):
                assert blocks == parameter.numel()
            else:
                assert blocks == (1 if "norm" in name else len(parameter))


def test_other_layers():
    layers = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3),
            "up": nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
            "norm": nn.BatchNorm2d(6),
            "lstm": nn.LSTM(5, 7),
            "bag": nn.EmbeddingBag(9, 5),
            "bilinear": nn.Bilinear(3, 4, 5),
        }
    )
    partition = adam_mini(layers)
    assert partition["conv.weight"] == "row"
    assert partition["norm.weight"] == "tensor" and partition["norm.bias"] == "coordinate"
    assert partition["lstm.weight_hh_l0"] == "row" and partition["lstm.bias_hh_l0"] == "coordinate"
    assert partition["bag.weight"] == partition["bilinear.weight"] == "row"
    ids = block_ids(partition["up.weight"], layers["up"].weight.shape)
    for group in range(2):  # noise in one block moves one output channel
        for channel in range(3):
            block = ids == ids[2 * group, channel, 0, 0]
            want = np.zeros_like(block)
            want[2 * group : 2 * group + 2, channel] = True
            assert (block == want).all()


def asks(model, *mentions, **arguments):
    with pytest.raises(ValueError) as error:
        adam_mini(model, **arguments)
    for text in mentions:
        assert text in str(error.value)


def attention(**children):
    """A module called Attention with these layers and attributes."""
    module = type("Attention", (nn.Module,), {})()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def linear(rows, columns=32):
    return nn.Linear(columns, rows, bias=False)


def test_asks_where_it_would_have_to_guess():
    model = nn.Sequential(attention(q_proj=linear(32), k_proj=linear(32), v_proj=linear(32)))
    asks(model, "0.q_proj.weight", "Linear in Attention, shape (32, 32)", "how many heads",
         "overrides=")  # fmt: skip
    asks(attention(q_proj=linear(32), num_heads=5), "5 heads of 6 rows, but there are 32 rows")
    asks(attention(q_proj=linear(32), num_heads=4, head_dim=16), "4 heads of 16 rows")
    asks(
        attention(q_proj=linear(64), k_proj=linear(24), head_dim=16, num_heads=4), "24 rows of keys"
    )
    asks(attention(q_proj=linear(64), k_proj=linear(48), head_dim=16, num_heads=4,
                   num_key_value_heads=2), "states 2 key heads")  # fmt: skip
    asks(attention(query_key_value=linear(96), num_heads=4), "in which order its rows are fused")
    asks(attention(qkv=linear(96), num_heads=5), "5 heads")
    asks(attention(qkv=linear(64), num_heads=4), "how many heads of keys")
    several = nn.ModuleDict(
        {"base_layer": linear(32), "lora_A": linear(8), "lora_B": linear(32, 8)}
    )
    asks(attention(k_proj=several, num_heads=4), "one of several layers in 'k_proj'")
    asks(attention(q_proj=linear(32), mystery=linear(32), num_heads=4), "mystery.weight")
    asks(nn.ModuleDict({"in_proj_qkvz": linear(96)}), "speaks of attention")
    asks(nn.ModuleDict({"key": linear(64), "receptance": linear(32)}), "how many heads")
    unknown = nn.ModuleDict({"vector": nn.Module(), "matrix": nn.Module()})
    unknown["vector"].gamma = nn.Parameter(torch.ones(7))
    unknown["matrix"].matrix = nn.Parameter(torch.ones(7, 3))
    asks(unknown, "2 parameters",
         "vector.gamma (Module in ModuleDict, shape (7,)): a vector of a module that is no norm",
         "matrix.matrix (Module in ModuleDict, shape (7, 3)): Module is not known")  # fmt: skip
    flat = nn.ModuleDict({"layer": linear(32)})
    flat.weights = nn.Parameter(torch.ones(70_000))  # as FSDP joins them
    asks(flat, "weights (ModuleDict, shape (70000,)): a vector")
    sharded = linear(32)
    sharded.weight = nn.Parameter(torch.ones(512))
    asks(sharded, "weight (Linear, shape (512,)): a vector")
    shared = nn.ModuleDict({"embedding": nn.Embedding(32, 32), "attn": attention(
        q_proj=linear(32), num_heads=4)})  # fmt: skip
    shared["attn"].q_proj.weight = shared["embedding"].weight
    asks(shared, "shared by uses that ask for 'row' and Heads(n=4)")
    ambiguous = nn.Module()
    ambiguous.up_proj = nn.Parameter(torch.ones(2, 8, 8))
    ambiguous.down_proj = nn.Parameter(torch.ones(2, 8, 8))
    asks(ambiguous, "up_proj", "down_proj", "stored (outputs, inputs) or transposed")


def test_vectors_by_coordinate():
    """Gains, decays and the like beside a module's layers, whatever their names; scales alone."""
    block = nn.Module()
    block.layer, block.lambda_1 = linear(32), nn.Parameter(torch.ones(32))
    block.alpha = nn.Parameter(torch.ones(1, 8, 1))
    block.scaled = type("LayerScale", (nn.Module,), {})()
    block.scaled.gain = nn.Parameter(torch.ones(32))
    partition = adam_mini(block)
    assert partition.pop("layer.weight") == "row"
    assert set(partition.values()) == {"coordinate"} and len(partition) == 3


def test_layers_beside_queries_and_keys():
    """What neither is nor speaks of them has neurons; a projection of positions asks."""
    layers = {"q_proj": linear(32), "k_proj": linear(32), "num_heads": 4}
    assert adam_mini(attention(**layers, gate_proj2=linear(4)))["gate_proj2.weight"] == "row"
    for name in ("relative_k_proj", "linear_pos", "r_proj", "query_gate"):
        asks(attention(**layers, **{name: linear(32)}), name, "its part in Attention is unknown")
    asks(attention(q_proj=linear(32), num_heads=4, gate2=linear(4)), "gate2.weight")


def test_parametrized_weights():
    """Weight normalisation leaves a layer's neurons where they are; other ways to compute ask."""
    from torch.nn.utils import parametrizations, parametrize

    norm = parametrizations.weight_norm
    partition = adam_mini(nn.ModuleList([norm(nn.Linear(4, 6)), norm(nn.ConvTranspose1d(4, 6, 3))]))
    prefix = "parametrizations.weight.original"
    assert partition[f"0.{prefix}0"] == partition[f"1.{prefix}0"] == "coordinate"
    assert partition[f"0.{prefix}1"] == "row"
    ids = block_ids(partition[f"1.{prefix}1"], (4, 6, 3))
    assert (ids == np.arange(6)[:, None]).all()
    spectral = parametrizations.spectral_norm(nn.Linear(4, 6))
    assert adam_mini(spectral)[f"{prefix}"] == "row"
    other = nn.Linear(4, 4)
    parametrize.register_parametrization(other, "weight", nn.Tanh())
    asks(other, "parametrizations.weight.original", "ParametrizationList is not known")


def test_tokens_by_what_lies_beside_them():
    """The features' axis from a layer beside it, a head's size, or the config of a part."""
    model = nn.Module()
    model.projection = nn.Conv2d(3, 24, 4)
    model.position_embeddings = nn.Parameter(torch.ones(1, 9, 24))
    table = attention(q_proj=linear(32), k_proj=linear(32), num_heads=4, hidden_size=32)
    table.rel_pos_h = nn.Parameter(torch.ones(7, 8))
    model.part = table
    model.config = hf.Blip2Config(qformer_config={"hidden_size": 20, "num_attention_heads": 4})
    model.query_tokens = nn.Parameter(torch.ones(1, 6, 20))
    partition = adam_mini(model)
    for name, tokens in (("position_embeddings", 9), ("part.rel_pos_h", 7), ("query_tokens", 6)):
        ids = block_ids(partition[name], model.get_parameter(name).shape)
        assert (ids.reshape(tokens, -1) == np.arange(tokens)[:, None]).all(), name
    model.pos_embed = nn.Parameter(torch.ones(1, 24, 5, 5))
    asks(model, "pos_embed", "which of its axes counts tokens")


def test_heads_narrower_than_the_model():
    """Fused rows need not be three times the width: what enters the output projection tells."""
    module = attention(to_qkv=linear(48), to_out=nn.Sequential(linear(32, 16)), heads=2)
    ids = block_ids(adam_mini(module)["to_qkv.weight"], (48, 32))[:, 0]
    assert ids.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8 + list(range(4, 20))


def test_layers_that_repeat_share_a_line():
    layers = nn.ModuleList([attention(q_proj=linear(32)) for _ in range(3)])
    asks(layers, "3 parameters", "*.q_proj.weight [3 of them]", '"*.q_proj.weight"')


def test_overrides():
    layers = nn.ModuleList([attention(q_proj=linear(32)) for _ in range(3)])
    partition = adam_mini(layers, overrides={"*.q_proj.weight": Heads(4), "1.q_proj.weight": "row"})
    assert list(partition.values()) == [Heads(4), "row", Heads(4)]
    asks(layers, "['*.k.weight'] match no parameter", overrides={"*.k.weight": "row"})
    asks(layers, "Heads(n=3) does not divide", overrides={"*": Heads(3)})


def test_frozen_parameters_do_not_ask():
    model = attention(q_proj=linear(32), v_proj=linear(32))
    model.q_proj.weight.requires_grad_(False)
    assert adam_mini(model) == {"v_proj.weight": "row"}


def test_another_towers_heads_are_not_taken():
    """A vision tower without a word about heads, inside a model whose text config has some."""
    model = nn.Module()
    model.config = hf.LlamaConfig(**SMALL)
    model.vision = attention(q_proj=linear(48, 48))
    asks(model, "vision.q_proj.weight", "how many heads")


def test_partitions_fit():
    model = hf.T5Model(hf.T5Config(**T5))
    for name, partition in adam_mini(model).items():
        assert resolve(partition, model.get_parameter(name).shape)
