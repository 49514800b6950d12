"""LLaMA-Factory's LoRA step in bfloat16, as its command line takes it. Runs in .venv-llama-factory.

Arguments: the model's directory, a JSON file with the token ids of one row.
"""

import importlib.machinery
import json
import os
import sys
import tempfile
import types
from pathlib import Path

from bench.turns import Turn

os.environ |= {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}


def main(source: str, row: str) -> None:
    turn = Turn()
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):  # its wheels need CUDA's libraries; it is imported, but not used here
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            losses = {"losses": [state.log_history[-1]["loss"]]} if state.log_history else {}
            if not turn.wait(**losses):
                sys.exit()

    ids = json.loads(Path(row).read_text())
    with tempfile.TemporaryDirectory() as folder:
        rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)}])
        DatasetDict(train=rows).save_to_disk(f"{folder}/rows")
        options = {
            "model_name_or_path": source,
            "stage": "pt",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "dataset": "rows",
            "tokenized_path": f"{folder}/rows",
            "template": "default",
            "output_dir": f"{folder}/out",
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "max_steps": 7800,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": True,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        run_exp(options, [Turns()])


if __name__ == "__main__":
    main(*sys.argv[1:])
