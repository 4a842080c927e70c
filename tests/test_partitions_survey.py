"""How many of transformers' architectures adam_mini classifies, and which still ask.

    python tests/test_partitions_survey.py [all | model types]    says which, and why

The test looks at a sample; ``all`` takes minutes. Models are built on the meta device from their
default configs, with at most two layers a tower.
"""

import sys

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from fusedopt.partitions import adam_mini

LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"),
    *("decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
CLASSIFIED = [
    *("bamba", "beit", "bert", "blip-2", "convnext", "data2vec-vision"),
    *("dinov2", "dinov3_vit", "falcon", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss"),
    *("internvl_vision", "llama", "mamba2", "mixtral", "modernbert", "phi3", "poolformer"),
    *("qwen3", "sam_vision_model", "swinv2", "t5", "vit", "wav2vec2", "whisper"),
]
ASKS = {  # a part of what it asks for
    "canary": "relative_k_proj",
    "convnextv2": "grn.weight",  # vectors alone in a module: a norm's gain, or not
    "dac": "snake1.alpha",
    "jetmoe": "self_attention.experts",
    "levit": "attention_biases",
    "qwen3_next": "linear_attn.in_proj_qkvz",
    "rwkv": "attention.key",
}


def shortened(config, depth=0):
    """The same architecture with fewer layers."""
    for name in LAYERS:
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > 2:
            setattr(config, name, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] + config.layer_types[-1:]
    for part in list(vars(config).values()):
        if isinstance(part, hf.PretrainedConfig) and depth < 3:
            shortened(part, depth + 1)
    return config


def built(name):
    """A model of this type, on the meta device."""
    kind = CONFIG_MAPPING[name]
    model = MODEL_MAPPING[kind]
    model = model[0] if isinstance(model, (tuple, list)) else model
    with torch.device("meta"):
        try:
            return model(shortened(kind()))
        except Exception:  # some want as many layers as their other options say
            return model(kind())


@pytest.mark.parametrize("name", CLASSIFIED)
def test_classified(name):
    adam_mini(built(name))


@pytest.mark.parametrize("name", ASKS)
def test_asks(name):
    with pytest.raises(ValueError, match=ASKS[name].replace(".", r"\.")):
        adam_mini(built(name))


def survey(names):
    """Prints what each asks for, and the counts."""
    counts = {"classified": 0, "asks": 0, "can't be built": 0}
    for name in names:
        try:
            model = built(name)
        except Exception as error:
            counts["can't be built"] += 1
            print(name, "can't be built:", str(error).partition("\n")[0])
            continue
        try:
            adam_mini(model)
            counts["classified"] += 1
        except ValueError as error:
            counts["asks"] += 1
            print(name, error)
    print(counts)


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    every = sorted(name for name, kind in CONFIG_MAPPING.items() if kind in MODEL_MAPPING)
    survey(every if sys.argv[1:] == ["all"] else sys.argv[1:])
