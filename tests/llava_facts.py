"""Conversations in tokens as LLaVA's own preprocessing has them, recorded in `llava_facts.json`.

To record them again (a LLaVA checkout, its own package on the path):

    PYTHONPATH=LLAVA:tests python tests/llava_facts.py
"""

import copy
import json
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_suffix(".json")
WORDS = (
    "▁ ▁a ▁the ▁cat ▁USER ▁A SIST ANT ▁ASSISTANT ▁Yes ▁No US ER USER ▁of ▁What ▁is ▁in ▁this"
    " ▁picture .</ ▁two ▁red ; ▁curious ▁user ▁assistant ▁and ▁questions"
)
ROWS: dict[str, list[tuple[str, str]]] = {
    "picture first": [("human", "<image>\nWhat is in this picture?"), ("gpt", "A red cat.")],
    "picture last": [("human", "What is in this picture?\n<image>"), ("gpt", "A red cat.")],
    "picture inside": [("human", " What is <image> this ? "), ("gpt", " A cat; two. ")],
    "picture alone": [("human", "<image>"), ("gpt", "a cat")],
    "turns": [
        ("human", "<image>\nWhat is this?"),
        ("gpt", "A cat."),
        ("human", "Is it red?"),
        ("gpt", "Yes"),
        ("human", "Are there two?\n"),
        ("gpt", "No, one\nof the two."),
    ],
    "words alone": [
        ("human", "What is a cat?"),
        ("gpt", "An animal."),
        ("human", "Yes?"),
        ("gpt", "Ja, 猫 é 🙂."),
    ],
}
PLAIN = {
    "caption": [("human", "Say it.\n<image>"), ("gpt", "a red cat")],
    "caption with space": [("human", "<image>\nSay it."), ("gpt", " two cats, é \n")],
}


def llama_tokenizer(*, legacy: bool) -> Any:
    """A small tokenizer that cuts text as Llama's does: pieces with ▁ for a space, and bytes.

    With `legacy` also what follows a special token begins with a ▁, as in Vicuna's.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted({"▁", *map(chr, range(33, 127))})
    merges = []
    for word in WORDS.split():
        if any(char not in pieces for char in word):
            continue
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=2048,
    )


def _record() -> dict[str, Any]:
    import transformers.trainer

    vars(transformers.trainer).setdefault("ALL_LAYERNORM_LAYERS", [])
    from llava import conversation as styles
    from llava.train.train import DataArguments, preprocess, preprocess_multimodal

    facts: dict[str, Any] = {}
    for name, rows in (("v1", ROWS), ("plain", PLAIN)):
        styles.default_conversation = styles.conv_templates[name]
        for legacy in (True, False):
            tokenizer = llama_tokenizer(legacy=legacy)
            tokenizer.legacy = legacy
            for row, said in rows.items():
                has_image = any("<image>" in text for _, text in said)
                source = [[{"from": who, "value": text} for who, text in said]]
                if has_image:
                    arguments = DataArguments(is_multimodal=True)
                    arguments.mm_use_im_start_end = False
                    source = preprocess_multimodal(copy.deepcopy(source), arguments)
                got = preprocess(source, tokenizer, has_image=has_image)
                key = f"{name}, {'legacy' if legacy else 'new'}, {row}"
                facts[key] = {n: got[n][0].tolist() for n in ("input_ids", "labels")}
    return facts


if __name__ == "__main__":
    FACTS.write_text(
        "{\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in _record().items())
        + "\n}\n"
    )
