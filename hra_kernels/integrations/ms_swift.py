"""ms-swift: `--tuner_type hra`, on these kernels. It takes plugins by their path:

    swift sft --external_plugins "$(python -c 'import hra_kernels, os; print(os.path.dirname(hra_kernels.__file__))')/\
integrations/ms_swift.py" --tuner_type hra --lora_rank 8 ...

It reads lora_rank, target_modules, target_parameters and modules_to_save; HRA has no alpha and no dropout.
"""

from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

import hra_kernels.peft

_TASKS = {"EMBEDDING": None, "RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}
"""PEFT's names for what ms-swift calls otherwise."""


class HRATuner(PeftTuner):
    """HRA in ms-swift's terms; files are PEFT's."""

    @staticmethod
    def prepare_model(args, model: nn.Module) -> nn.Module:
        """The model with a fresh adapter as `args` ask for."""
        from peft import get_peft_model
        from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules  # it imports tuners_map

        hra_kernels.peft.enable()
        task = args.task_type.upper()
        config = hra_kernels.peft.HRAConfig(
            r=args.lora_rank, target_modules=get_target_modules(args, model),
            target_parameters=args.target_parameters, modules_to_save=get_modules_to_save(args, model, task) or None,
            task_type=_TASKS.get(task, task),
        )  # fmt: skip
        return get_peft_model(model, config)

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs) -> nn.Module:
        hra_kernels.peft.enable()
        return PeftTuner.from_pretrained(model, model_id, **kwargs)


tuners_map["hra"] = HRATuner
