"""LoRA adapters of peft on quantized linears."""

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from pyqkern.nn.linear import QLinear


class LoraQLinear(Linear):  # type: ignore[misc]
    """A QLinear and its adapters: y = base(x) + scaling * B(A(x)). The base's weight is never changed."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "adapters cannot be merged into quantized weights; keep them apart, or merge them into the float model"
        )


def lora(config: LoraConfig) -> LoraConfig:
    """`config`, with which peft puts adapters on quantized linears; it knows only its own kinds otherwise.

    model = get_peft_model(model, pyqkern.lora(LoraConfig(target_modules=["query", "value"])))
    model = PeftModel.from_pretrained(model, folder, config=pyqkern.lora(LoraConfig.from_pretrained(folder)))

    >>> import torch, pyqkern
    >>> from peft import LoraConfig, get_peft_model
    >>> model = pyqkern.replace_linear(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    >>> model = get_peft_model(model, pyqkern.lora(LoraConfig(r=4, target_modules=["0"])))
    >>> type(model.base_model.model[0]).__name__
    'LoraQLinear'
    """
    config._register_custom_module({QLinear: LoraQLinear})
    return config
