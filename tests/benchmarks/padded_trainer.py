"""The other side of `tuning.py`: transformers' Trainer as its documentation shows it for a Llava.

Rows are read by the data set, and made a batch by the model's own processor, which pads them to the
longest; the tokens of the answers alone are supervised.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainingArguments

ROLES = {"human": "user", "gpt": "assistant"}


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """LLaVA's rows in the order of their `numbers`, as messages with their picture, if any."""

    def __init__(self, file: Path, numbers: Sequence[int]) -> None:
        self._rows, self._folder = json.loads(file.read_text()), file.parent
        self._numbers = numbers
        self.when_read: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.when_read()
        row = self._rows[self._numbers[index]]
        messages = []
        for one in row["conversations"]:
            text = one["value"].removeprefix("<image>\n")
            content = [{"type": "text", "text": text}]
            if text != one["value"]:
                picture = Image.open(self._folder / row["image"]).convert("RGB")
                content.insert(0, {"type": "image", "image": picture})
            messages.append({"role": ROLES[one["from"]], "content": content})
        return {"messages": messages}


def collated(processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A function from rows to a padded batch with labels."""
    processor.tokenizer.padding_side = "right"

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        made = processor.apply_chat_template(
            [row["messages"] for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        )
        batch: dict[str, Tensor] = dict(made)
        is_said = torch.as_tensor(batch.pop("assistant_masks")).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_said, -100)
        return batch

    return collate


def trainer(
    model: torch.nn.Module, processor: Any, rows: Rows, args: Any, folder: Path, lr: float
) -> Trainer:
    """A Trainer for one pass over `rows`, in their order, with the settings of `args`."""
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(rows) // args.batch,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.batch // args.micro_batch,
        # Rows come in random order, as by default, but in that of the other side.
        train_sampling_strategy="sequential",
        learning_rate=lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=args.precision == "bf16",
        gradient_checkpointing=args.checkpointing,
        use_cpu=args.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    return Trainer(model, settings, data_collator=collated(processor), train_dataset=rows)
