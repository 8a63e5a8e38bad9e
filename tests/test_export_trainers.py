"""An export in the hands of others: transformers' classes, pipeline and Trainer, TRL, and peft.

Nothing of ours is called after the export.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from aimv2_mllm import __main__ as command
from aimv2_mllm.export.answers import picture

QUESTION, ANSWER = "What is on the sheet?", "a red 7 at the top left"


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("exports") / "mine"
    assert command.main(["export", str(tiny_run), str(folder)]) == 0
    return str(folder)


@pytest.fixture
def loaded(exported: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(exported)
    return model, AutoProcessor.from_pretrained(exported)


def conversation(image: Image.Image | None, answer: str | None = ANSWER) -> list[dict[str, Any]]:
    shown = {"type": "image"} if image is None else {"type": "image", "image": image}
    asked = {"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [asked, said] if answer else [asked]


def batch(processor: Any) -> dict[str, torch.Tensor]:
    """Two conversations, padded, with labels on what the assistant says."""
    made = processor.apply_chat_template(
        [conversation(picture(70)), conversation(picture(56), "no")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    mask = torch.as_tensor(made.pop("assistant_masks")).bool()
    return {**made, "labels": made["input_ids"].masked_fill(~mask, -100)}


def test_stock_classes_answer_a_batch(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    assert type(model).__module__ == "transformers.models.llava.modeling_llava"
    processor.tokenizer.padding_side = "left"
    inputs = processor.apply_chat_template(
        [conversation(picture(70), None), conversation(picture(90), None)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 2
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_the_pipeline_says_what_the_model_says(exported: str, loaded: tuple[Any, Any]) -> None:
    from transformers import pipeline

    talk = pipeline("image-text-to-text", model=exported)
    [found] = talk(
        text=conversation(picture(70), None), max_new_tokens=4, do_sample=False,
        return_full_text=False,
    )  # fmt: skip
    model, processor = loaded
    inputs = processor.apply_chat_template(
        conversation(picture(70), None), add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert found["generated_text"] == processor.decode(new, skip_special_tokens=True)


def test_transformers_trainer_learns_from_it(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, processor = loaded
    data = batch(processor)
    assert processor.decode(data["labels"][0][data["labels"][0] >= 0]).strip().startswith(ANSWER)
    words = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=3e-3,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, words, train_dataset=[{}] * 8, data_collator=lambda _: dict(data))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_trl_learns_from_messages_with_adapters_of_peft(
    exported: str, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    from datasets import Dataset
    from datasets import Image as Pictures
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForImageTextToText
    from trl import SFTConfig, SFTTrainer

    model, processor = loaded
    rows = [{"images": [picture(70 + n)], "messages": conversation(None)} for n in range(4)]
    data = Dataset.from_list(rows).cast_column("images", [Pictures()])
    words = SFTConfig(
        str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
        max_length=None, assistant_only_loss=True, gradient_checkpointing=False,
        disable_tqdm=True,
    )  # fmt: skip
    adapters = LoraConfig(
        r=4,
        target_modules=r".*\.language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    trainer = SFTTrainer(
        model, words, train_dataset=data, processing_class=processor, peft_config=adapters
    )
    [first] = [trainer.data_collator([data[0]])]
    supervised = first["labels"][0][first["labels"][0] >= 0]
    assert processor.decode(supervised) == f" {ANSWER}<|end|>"  # not pictures, not the question
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    trainer.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(exported), tmp_path / "adapter"
    )
    inputs = batch(processor)
    with torch.no_grad():
        mine, theirs = (m.eval()(**inputs).logits for m in (trainer.model, again))
    assert torch.allclose(mine, theirs, atol=1e-5)
