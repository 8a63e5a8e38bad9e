"""A recipe says what it means, and every mistake in it is told at once, with its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from aimv2_mllm.errors import UsageError
from aimv2_mllm.recipe.data import SOURCE_SECTIONS
from aimv2_mllm.recipe.file import MAX_BYTES, load_recipe
from aimv2_mllm.recipe.schema import (
    EXECUTION_KEYS,
    EvaluationConfig,
    Recipe,
    changed_keys,
    deciding,
    dump_recipe,
)
from aimv2_mllm.recipe.stages import SECTIONS, DecoderChoice, LitStage, PretrainStage
from aimv2_mllm.recipe.train import TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
TRAIN = "{steps: 10, batch_size: 4, lr: 1e-3}"
TEXT = """\
name: tiny
stages:
  words:
    kind: language
    model: {hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4,
            num_key_value_heads: 2, max_position_embeddings: 128}
    vocab_size: 300
    train: {steps: 10, batch_size: 4, lr: 1e-3}
  see:
    kind: pretrain
    encoder: {size: aimv2_nano, image_size: 56}
    tokenizer: tiny_llm
    train: {steps: 10, batch_size: 4, lr: 1e-3}
  join:
    kind: align
    tower: see
    llm: words
    train: {steps: 10, batch_size: 4, lr: 1}
  tune:
    kind: tune
    start: join
    train: {steps: 10, batch_size: 4, lr: 0.001}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    return path


def mistakes(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_recipe(file, overrides)
    return str(caught.value).split("\n")


def mistake(file: Path, *overrides: str) -> str:
    lines = mistakes(file, *overrides)
    assert len(lines) == 1, lines
    return lines[0]


def test_a_recipe_fills_its_defaults_and_keeps_the_order_of_stages(file: Path) -> None:
    recipe = load_recipe(file)
    assert list(recipe.stages) == ["words", "see", "join", "tune"]
    assert recipe.output == Path("runs/tiny")
    assert recipe.stages["see"].decoder.num_attention_heads == 8
    assert recipe.stages["tune"].train.betas == (0.9, 0.95)
    assert recipe.evaluation is None


def test_a_dumped_recipe_loads_back_equal(file: Path, tmp_path: Path) -> None:
    words = ["name=no", "stages.see.tokenizer=1e-3", "stages.see.train.eps=1e-300"]
    words += ["stages.tune.lora.targets=['1.5e3', '010', 'null', '<<', '=', '1:30', '2020-01-01']"]
    recipe = load_recipe(
        file, [*words, "evaluation={}", "stages.join.train.part_lr.connector=3e-4"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert yaml.safe_load(dump_recipe(recipe))["stages"]["tune"]["lora"]["r"] == 8
    assert changed_keys(recipe, load_recipe(again)) == []


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".1e-2", "1.e-3", "0.001"])
def test_numbers_with_an_exponent_are_numbers(file: Path, text: str) -> None:
    assert load_recipe(file, [f"stages.tune.train.lr={text}"]).stages["tune"].train.lr == 0.001


def test_text_that_looks_like_a_number_or_a_switch_stays_text(file: Path) -> None:
    for text in ("1e3", "on", "no", "007", "2020-01-01"):
        assert load_recipe(file, [f"name={text}"]).name == text


def test_on_and_off_are_switches_where_a_switch_is_wanted(file: Path) -> None:
    key = "stages.see.train.compile"
    assert load_recipe(file, [f"{key}=on"]).stages["see"].train.compile is True
    assert load_recipe(file, [f"{key}=No"]).stages["see"].train.compile is False
    assert "must be true or false" in mistake(file, f"{key}=1")


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("train.steps=3.5", "is 3.5, must be a whole number"),
        ("train.steps=1e3", "must be a whole number"),
        ("train.steps=010", 'is "010", must be a whole number'),
        ("train.steps=true", "is true, must be a whole number"),
        ("train.steps=0", "is 0, must be greater than 0"),
        ("train.lr=true", "is true, must be a number"),
        ("train.lr=yes", 'is "yes", must be a number'),
        ("train.lr=1:30", "must be a number"),
        ("train.lr=.nan", "must be a finite number"),
        ("train.lr=1e999", "must be a finite number"),
        ("train.lr=0", "must be greater than 0"),
        ("train.betas=[0.9, 1]", "must be less than 1"),
        ("train.part_lr.lora=-1", "is -1, must be greater than 0"),
        ("train.warmup_steps=10", "is 10, must be less than steps, which is 10"),
        ("train.micro_batch_size=5", "is 5, must be at most batch_size, which is 4"),
        ("train.precision=bf61", "must be one of fp32, bf16; did you mean bf16?"),
        ("train.step=3", "unknown key; the keys here are steps, .* did you mean steps?"),
        ("lora.dropout=1", "must be less than 1"),
        ("lora.targets=[]", "must not be empty"),
        ("lora.options={use_dora: true}", "must not have use_dora, which is the key lora.dora"),
        ("trains=lore", 'is "lore", must be one of lora, llm, connector; did you mean lora?'),
        ("quantise=nf5", "must be one of nf4, int8; did you mean nf4?"),
        ("tower_blocks=-1", "is -1, must be how many of the last blocks, 0 or more, or all"),
        ("tower_blocks=every", 'is "every", must be how many of the last blocks'),
        ("tower=see", 'is "see", must be left out where start is given'),
        ("connector=mlp", "must be left out where start is given"),
        ("data.sources=[{kind: handwriting, turns: 9}]", "must be less than or equal to 8"),
        (
            "data.sources=[{kind: handwriting, tasks: {quest: 1}}]",
            "must be one of describe, backwards, table, several, question; did you mean question",
        ),
        (
            "data.sources=[{kind: llama}]",
            "must be one of .*; did you mean llava",
        ),
        ("train=3", "is 3, must be a mapping"),
        ("kind=tuna", 'is "tuna", must be one of .*; did you mean tune?'),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_rule(file: Path, word: str, rule: str) -> None:
    line = mistake(file, f"stages.tune.{word}")
    assert line.startswith(f'{file}, override "stages.tune.{word}": stages.tune.')
    assert re.search(rule, line), line


@pytest.mark.parametrize(
    ("sources", "rule"),
    [
        ("[{kind: questions}]", "data.sources.0.folder: missing .the folder"),
        (
            "[{file: a.json}]",
            "sources.0.kind: missing .the kind of the source: handwriting, llava,",
        ),
        ("[{kind: llava, file: a, rot: b}]", "sources.0.rot: unknown key; .*did you mean root"),
        ("[{kind: llava, file: a, weight: 0}]", "sources.0.weight: is 0, must be greater than 0"),
        ("[{kind: captions, pairs: {kind: tar}}]", "pairs.kind: is .tar., must be one of shards,"),
        ("[{kind: captions, pairs: {url: a}}]", "pairs.kind: missing .the kind of the source: sh"),
        ("[{kind: captions, pairs: {kind: folder}}]", "sources.0.pairs.folder: missing .the fold"),
        ("[{kind: captions, pairs: {kind: handwriting}}]", "pairs.kind: is .handwriting., must be"),
        ("[]", "must not be empty"),
    ],
)
def test_a_mistake_in_a_source_of_conversations_is_told(
    file: Path, sources: str, rule: str
) -> None:
    assert re.search(rule, mistake(file, f"stages.tune.data.sources={sources}"))


def test_an_entry_of_a_list_is_overridden_by_its_number(file: Path) -> None:
    given = "stages.tune.data.sources=[{kind: handwriting}, {kind: llava, file: a.json}]"
    key = "stages.tune.data.sources"
    recipe = load_recipe(file, [given, f"{key}.0.turns=3", f"{key}.1.file=b.json"])
    sources = recipe.stages["tune"].data.sources
    assert (sources[0].turns, sources[1].file) == (3, "b.json")
    assert "the list has 2, the first is 0" in mistake(file, given, f"{key}.2.turns=3")
    line = mistake(file, given, f"{key}.0.turns=9")
    assert line.startswith(f'{file}, override "{key}.0.turns=9": {key}.0.turns: is 9, must be')
    assert "it has no keys: give it whole" in mistake(file, given, f"{key}.one.turns=3")


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        (
            "stages.see.decoder.hidden_size=100",
            "num_attention_heads: is 8, must divide hidden_size",
        ),
        ("stages.words.model.num_key_value_heads=3", "must divide num_attention_heads, which is 4"),
        ("stages.see.encoder.image_size=57", "multiple of 14"),
        ("stages.see.encoder.image_size=14", "greater than or equal to 28"),
        ("stages.see.encoder.size=aimv2_nan", "did you mean aimv2_nano"),
        ("name=a/b", "must be a name"),
        ("name=..", "must be a name"),
        ("name=2024", "must be text: put it in quotes"),
        ("seed=-1", "greater than or equal to 0"),
        ("output=3", "output: is 3, must be text"),
        ("stages={}", "stages: is {}, must not be empty"),
        ("evaluation.question=3", "did you mean questions"),
        ("sed=3", "sed: unknown key; .*did you mean seed"),
    ],
)
def test_a_wrong_choice_is_told_with_its_rule(file: Path, word: str, rule: str) -> None:
    assert re.search(rule, mistake(file, word))


def test_all_mistakes_are_told_at_once_with_file_and_line(file: Path) -> None:
    text = TEXT.replace("aimv2_nano", "aimv2_nana").replace("tower: see", "tower: sea")
    text = text.replace("    start: join\n", "").replace("lr: 1}", "lr: 1, lr: 2, stps: 3}")
    file.write_text(text + "1: x\n")
    lines = mistakes(file, "nonsense", "stages.see.alpha=-1")
    expected = [
        ("tiny.yaml:18: stages.join.train.lr: ", "is written twice, at lines 18 and 18"),
        ("tiny.yaml:22: 1: ", "the key is not text"),
        ('tiny.yaml, override "nonsense": ', "key=value, for example"),
        ("tiny.yaml:11: stages.see.encoder.size: ", "did you mean aimv2_nano?"),
        ('override "stages.see.alpha=-1": stages.see.alpha: ', "is -1"),
        ("tiny.yaml:18: stages.join.train.stps: ", "did you mean steps?"),
        ("tiny.yaml:19: stages.tune.tower: ", "is null, must be given where there is no start"),
        ("tiny.yaml:16: stages.join.tower: ", "must be an earlier pretrain stage: there are see;"),
    ]
    assert len(lines) == len(expected), lines
    for line, (place, text) in zip(lines, expected, strict=True):
        assert place in line, line
        assert text in line, line


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("stages.tune.start=see", "must be an earlier align or tune stage: there are join; a fold"),
        ("stages.tune.start=tune", "must be an earlier align or tune stage: there are join; a"),
        ("stages.join.llm=tune", "must be an earlier language stage: there are words"),
        ("stages.join.tower=words", "must be an earlier pretrain stage: there are see; a folder"),
    ],
)
def test_a_reference_names_an_earlier_stage_of_the_right_kind(
    file: Path, word: str, rule: str
) -> None:
    assert re.search(rule, mistake(file, word))


def test_a_tower_or_llm_may_come_from_outside(file: Path) -> None:
    recipe = load_recipe(file, ["stages.join.tower=./towers/see", "stages.join.llm=gpt2"])
    assert recipe.stages["join"].tower == "./towers/see"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ("lora", "connector")),
        (["trains=llm"], ("llm", "connector")),
        (["trains=connector"], ("connector",)),
        (["tower_blocks=2"], ("lora", "connector", "tower")),
        (["trains=llm", "tower_blocks=all"], ("llm", "connector", "tower")),
    ],
)
def test_a_rate_may_be_given_to_each_part_that_is_trained(
    file: Path, words: list[str], parts: tuple[str, ...]
) -> None:
    said = [f"stages.tune.{word}" for word in words]
    rates = ", ".join(f"{part}: 1e-5" for part in parts)
    recipe = load_recipe(file, [*said, f"stages.tune.train.part_lr={{{rates}}}"])
    assert recipe.stages["tune"].parts_of(recipe.stages["tune"].model_dump()) == parts
    line = mistake(file, *said, "stages.tune.train.part_lr={toewr: 1}")
    assert f"must name in part_lr parts of the stage, which are {', '.join(parts)}" in line


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["trains=llm", "quantise=nf4"], "is .nf4., must be null where trains is llm"),
        (["lora.dora=true", "quantise=int8"], "must be nf4 or null where lora.dora is true"),
        (["trains=connector", "lora.r=4"], "must be left out where trains is connector"),
        (["start=null", "llm=words"], "tower: is null, must be given where there is no start"),
        (["start=null", "tower=see"], "llm: is null, must be given where there is a tower"),
        (["start=null", "tower=see", "llm=join"], "llm: is .join., must be an earlier language"),
    ],
)
def test_choices_of_a_tune_stage_that_exclude_each_other_are_told(
    file: Path, words: list[str], rule: str
) -> None:
    assert re.search(rule, mistake(file, *(f"stages.tune.{word}" for word in words)))


def test_a_tune_stage_may_start_from_a_folder_another_one_or_parts(file: Path) -> None:
    for start in ("./llava", "llava-hf/llava-1.5-7b-hf"):
        assert load_recipe(file, [f"stages.tune.start={start}"]).stages["tune"].start == start
    parts = ["start=null", "tower=see", "llm=words", "connector={name: pixel_shuffle, factor: 4}"]
    recipe = load_recipe(file, [f"stages.tune.{word}" for word in parts])
    assert recipe.stages["tune"].connector.factor == 4
    again = file.with_name("again.yaml")
    again.write_text(f"{TEXT}  more:\n    kind: tune\n    start: tune\n    train: {TRAIN}\n")
    assert load_recipe(again).stages["more"].start == "tune"


def test_a_stage_may_not_refer_to_a_later_one() -> None:
    plain = yaml.safe_load(TEXT.replace("1e-3", "0.001"))
    plain["stages"] = dict(reversed(plain["stages"].items()))
    with pytest.raises(
        ValidationError, match="must be an earlier align or tune stage: there is none"
    ):
        Recipe.model_validate(plain)


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("stages.tun.train.lr=1", "the stages are words, see, join, tune; did you mean tune?"),
        ("name.x=3", 'name: is "tiny", it has no keys'),
        ("a..b=3", "is not an override"),
        ("seed=[1", "seed: its value:1:3: expected"),
        ("seed=*x", "aliases"),
    ],
)
def test_an_override_that_leads_nowhere_is_told(file: Path, word: str, rule: str) -> None:
    assert rule in mistake(file, word)


def test_overrides_come_before_the_judgement_and_the_last_one_counts(file: Path) -> None:
    file.write_text(TEXT.replace("vocab_size: 300", "vocab_size: many"))
    words = ["stages.words.vocab_size=1", "stages.words.vocab_size=2", "evaluation.sheets=3"]
    recipe = load_recipe(file, words)
    assert recipe.stages["words"].vocab_size == 2
    assert recipe.evaluation == EvaluationConfig(sheets=3)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", ": is empty"),
        (b"# nothing\n", ": is empty"),
        (b"[1, 2]", r": is \[1, 2\], a recipe is a mapping"),
        (b"\x89PNG\xff", "is not UTF-8 text"),
        (b"a: \x00", "not a text file that YAML allows"),
        (b"a: b\nc: : d\n", r':2:4: mapping values are not allowed here: "c: : d"'),
        (b"a:\n\tb: 1", r":2:1: found character"),
        (b"a: &x [1]\nb: *x", ":2:4: aliases .* are not allowed"),
        (b"a: !!python/name:os.system x", ":1:4: tags .* are not allowed"),
        (b"[" * 5000, "nested deeper than"),
        (b"a: 1\n---\nb: 1", "another document"),
        (b"a: " + b"x" * MAX_BYTES, "is larger than 256 KiB"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(
    file: Path, content: bytes, rule: str
) -> None:
    file.write_bytes(content)
    line = mistake(file)
    assert line.startswith(str(file)), line
    assert re.search(rule, line), line


def test_a_missing_recipe_lists_those_beside_it(file: Path) -> None:
    line = mistake(file.with_name("tinny.yaml"))
    assert f"the recipes in {file.parent} are tiny.yaml; did you mean tiny.yaml?" in line
    assert "is a folder; the recipes in" in mistake(file.parent)
    assert "there is no folder" in mistake(file.parent / "nowhere" / "tiny.yaml")


def test_a_number_of_many_digits_is_refused_not_crashed_on(file: Path) -> None:
    assert "must be a whole number" in mistake(file, "seed=" + "9" * 5000)
    assert "must be less than" in mistake(file, "seed=" + "9" * 30)


def test_changed_keys_tell_old_and_new_values(file: Path) -> None:
    old = load_recipe(file, ["stages.tune.train.part_lr.lora=1"])
    new = load_recipe(
        file,
        ["stages.tune.train.lr=2e-3", "stages.see.train.part_lr.encoder=1e-4"],
    )
    assert changed_keys(old, new) == [
        "stages.see.train.part_lr.encoder: added 0.0001",
        "stages.tune.train.lr: 0.001 -> 0.002",
        "stages.tune.train.part_lr.lora: removed 1.0",
    ]


def test_a_rate_for_a_part_that_the_stage_does_not_train_is_refused(file: Path) -> None:
    said = mistake(file, "stages.tune.train.part_lr.conector=1")
    assert re.search(r"stages\.tune\.train: .* lora, connector; did you mean connector\?", said)


def test_micro_batches_are_counted_in_one_way_and_in_tokens_only_where_stages_talk(
    file: Path,
) -> None:
    both = ["stages.tune.train.micro_batch_size=2", "stages.tune.train.micro_batch_tokens=99"]
    assert "micro_batch_tokens: is 99, must be null where micro_batch_size is 2" in mistake(
        file, *both
    )
    said = mistake(file, "stages.see.train.micro_batch_tokens=99")
    assert re.search(r"stages.see.train: .* in place of micro_batch_tokens .*: all have as", said)
    assert "contrasts are within a micro-batch" in LitStage.BY_SAMPLES


def test_how_a_run_is_executed_is_no_change_and_decides_nothing(file: Path) -> None:
    def own(recipe: Recipe) -> dict[str, Any]:
        return deciding(recipe.stages["see"].model_dump(mode="json"))

    words = ["device=cpu", "strategy=fsdp2", "compile=on", "activation_checkpointing=on"]
    words += ["micro_batch_size=1", "checkpoint_every=7", "keep_checkpoints=9"]
    words += ["trackers=[wandb]", "log_every=3"]
    tokens = "micro_batch_tokens"  # in place of micro_batch_size, where stages talk
    assert {word.split("=")[0] for word in words} | {tokens} == EXECUTION_KEYS["train"]
    old, new = load_recipe(file), load_recipe(file, [f"stages.see.train.{word}" for word in words])
    assert old != new
    assert changed_keys(old, new) == []
    assert own(old) == own(new)
    packed = load_recipe(file, [f"stages.tune.train.{tokens}=99"])
    assert packed != old
    assert changed_keys(old, packed) == []
    other = load_recipe(file, ["stages.see.train.precision=bf16"])
    assert own(old) != own(other)


@pytest.mark.parametrize(
    "word", ["output=elsewhere", "evaluation={seed: 3}", "stages.see.data.max_skipped=0.5"]
)
def test_where_it_lies_how_it_is_judged_and_when_it_is_given_up_is_no_change(
    file: Path, word: str
) -> None:
    old, new = load_recipe(file), load_recipe(file, [word])
    assert old != new
    assert changed_keys(old, new) == []


def test_changed_keys_read_a_saved_mapping_with_its_defaults(file: Path) -> None:
    new = load_recipe(file)
    plain: dict[str, Any] = yaml.safe_load(TEXT.replace("1e-3", "0.001"))
    assert changed_keys(plain, new) == []
    assert changed_keys(yaml.safe_load(dump_recipe(new)), new) == []
    assert "stages.tune.train.steps: 9 -> 10" in changed_keys(
        {"unknown": 1, "stages": {"tune": {"train": {"steps": 9}}}}, new
    )


def test_changed_keys_tell_a_new_order_of_stages(file: Path) -> None:
    old = load_recipe(file)
    stages = {name: old.stages[name] for name in ("see", "words", "join", "tune")}
    new = Recipe(name="tiny", stages=stages)
    assert changed_keys(old, new) == [
        "stages: order words, see, join, tune -> see, words, join, tune"
    ]


def test_a_recipe_is_frozen() -> None:
    train = TrainConfig(steps=1, batch_size=1, lr=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        train.lr = 2.0  # type: ignore[misc]


def test_every_key_of_the_schema_is_described() -> None:
    todo: list[type[BaseModel]] = [Recipe, EvaluationConfig, DecoderChoice, *SECTIONS.values()]
    todo += SOURCE_SECTIONS.values()
    for stage in SECTIONS.values():
        kinds = [field.annotation for field in stage.model_fields.values()]
        todo += [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    for section in todo:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_a_mistake_stays_on_one_line_whatever_its_key(file: Path) -> None:
    file.write_text(TEXT + '"a\\nb": 3\n')
    assert f"{file}:23: a\\nb: unknown key" in mistake(file)


def test_an_unsafe_stage_name_is_told_at_its_own_place(file: Path) -> None:
    file.write_text(TEXT.replace("  tune:", "  ../tune:"))
    assert f'{file}:19: stages.../tune: is "../tune", must be a name' in mistake(file)


def test_a_mistake_inside_an_overriding_mapping_is_told_of_the_override(file: Path) -> None:
    line = mistake(file, "stages.words.model.hidden_size=64", "stages.tune.lora={r: 0}")
    assert line.startswith(f'{file}, override "stages.tune.lora={{r: 0}}": stages.tune.lora.r: ')
    file.write_text(TEXT.replace("start: join", "start: join\n    lora: {r: 1}"))
    line = mistake(file, "stages.tune.lora={r: 0}")
    assert line.startswith(f'{file}, override "stages.tune.lora={{r: 0}}": stages.tune.lora.r: ')


SOURCES = """\
name: tiny
stages:
  see:
    kind: pretrain
    encoder: {size: aimv2_nano, image_size: 56}
    tokenizer: tiny_llm
    data:
      sources:
        - {kind: shards, urls: "a/*.tar", weight: 0}
        - {kind: shard, urls: "a/*.tar"}
        - {urls: "a/*.tar"}
        - {kind: jsonl,
           fil: x}
        - 3
        - {kind: shards, urls: []}
        - {kind: shards, urls: [x, 3]}
        - {kind: folder, folder: x, weight: -1}
      workers: -1
    train: {steps: 10, batch_size: 4, lr: 1e-3}
"""


def test_mistakes_in_sources_are_told_with_line_and_place(file: Path) -> None:
    file.write_text(SOURCES)
    known = "must be one of handwriting, shards, datasets, folder, jsonl; did you mean shards?"
    expected = [
        (9, "0.weight: is 0, must be greater than 0"),
        (10, f'1.kind: is "shard", {known}'),
        (11, "2.kind: missing (the kind of the source: handwriting, shards, datasets"),
        (12, "3.file: missing (the file)"),
        (13, "3.fil: unknown key; the keys here are weight, kind, file, root"),
        (14, "4: is 3, must be a mapping"),
        (15, "5.urls: is [], must not be empty"),
        (16, "6.urls.1: is 3, must be text"),
        (17, "7.weight: is -1, must be greater than 0"),
    ]
    found = mistakes(file)
    assert len(found) == len(expected) + 1, found
    for line, (number, text) in zip(found, expected, strict=False):
        assert line.startswith(f"{file}:{number}: stages.see.data.sources.{text}"), line
    assert f"{file}:18: stages.see.data.workers: is -1" in found[-1]


def test_a_single_source_is_short_and_the_world_is_the_shortest(file: Path) -> None:
    word = "stages.see.data={sources: [{kind: shards, urls: 'a-{000..009}.tar'}]}"
    [source] = load_recipe(file, [word]).stages["see"].data.sources
    assert source.urls == ["a-{000..009}.tar"]
    [world] = load_recipe(file, ["stages.see.data={seed: 1}"]).stages["see"].data.sources
    assert world.kind == "handwriting"


def test_what_only_says_where_and_how_fast_is_no_change(file: Path) -> None:
    def given(workers: int, cache: str, urls: str = "a.tar") -> Recipe:
        source = f"{{kind: shards, urls: {urls}, cache: {cache}}}"
        return load_recipe(file, [f"stages.see.data={{workers: {workers}, sources: [{source}]}}"])

    assert changed_keys(given(0, "x"), given(8, "y")) == []
    assert len(changed_keys(given(0, "x"), given(0, "x", urls="b.tar"))) == 1


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["alpha=0", "text_weight=0"], "text_weight: is 0, must be above 0 where alpha is 0"),
        (["prefix=full"], 'prefix: is "full", must be uniform where alpha is above 0'),
        (["start.encoder=words"], "start.encoder: .*must be an earlier pretrain stage"),
        (["start.decodr=./x"], "start.decodr: unknown key; .*did you mean decoder"),
    ],
)
def test_a_pretrain_stage_that_could_not_learn_is_told(
    file: Path, words: list[str], rule: str
) -> None:
    said = mistake(file, *(f"stages.see.{word}" for word in words))
    assert re.search(f"stages.see.{rule}", said), said


def test_a_start_may_be_a_folder_or_a_hub_id(file: Path) -> None:
    hub = "apple/aimv2-large-patch14-224"
    recipe = load_recipe(file, [f"stages.see.start.encoder={hub}", "stages.see.start.decoder=./x"])
    stage = recipe.stages["see"]
    assert isinstance(stage, PretrainStage)
    assert (stage.start.encoder, stage.start.decoder) == (hub, "./x")


@pytest.mark.parametrize(
    ("said", "connector"),
    [
        ("mlp", {"name": "mlp", "depth": 2}),
        ("{name: pixel_shuffle, factor: 4}", {"name": "pixel_shuffle", "factor": 4, "depth": 2}),
        (
            "{name: average_pool, target: 6}",
            {"name": "average_pool", "factor": None, "target": [6, 6], "depth": 2},
        ),
    ],
)
def test_a_connector_is_a_name_or_a_name_with_options(
    said: str, connector: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml", [f"stages.align.connector={said}"])
    assert recipe.stages["align"].model_dump()["connector"] == connector
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    ("said", "lines"),
    [
        ("mpl", [r'connector\.name: is "mpl", must be one of linear, .*; did you mean mlp\?']),
        ("{factor: 2}", [r"connector\.name: missing \(the connector: linear, mlp, .*abstractor\)"]),
        (
            "{name: pixel_shuffle, factor: 0, facter: 3}",
            [
                r"connector\.factor: is 0, must be greater than 0 \(side of a square, patches\)",
                r"connector\.facter: unknown key; .* name, factor, depth; did you mean factor\?",
            ],
        ),
        ("average_pool", [r"must have either factor or target, for instance factor: 2"]),
        (
            "{name: c_abstractor, target: [2, 3, 4]}",
            [r"connector\.target: is \[2, 3, 4\], must have"],
        ),
        (
            "{name: resampler, num_queries: many}",
            [r'num_queries: is "many", must be a whole number'],
        ),
        (
            "3",
            [r"connector: is 3, must be a mapping \(a connector's name, or its name and options"],
        ),
    ],
)
def test_mistakes_in_a_connector_are_told_with_their_places(said: str, lines: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(RECIPES / "quickstart.yaml", [f"stages.align.connector={said}"])
    found = str(error.value).splitlines()
    assert len(found) == len(lines)
    for line, pattern in zip(found, lines, strict=True):
        assert re.search(pattern, line), line
