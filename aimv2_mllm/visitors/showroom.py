"""The models that are shown to visitors, and what is remembered of each visitor's conversation.

Owns which models there are, by name, and when memory is given back. Refuses models that cannot
talk before anything is loaded. Pictures and answers are `visit`'s and `chat`'s.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aimv2_mllm import heap
from aimv2_mllm.chat.chat import load_model
from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.chat.session import ChatSession, Reply
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.errors import UsageError, nearest
from aimv2_mllm.folders import RECIPE_FILE, pretrained_folder, stages_of, talking_folders
from aimv2_mllm.model.sampling import GREEDY, Sampling
from aimv2_mllm.visitors.visit import Shown, asked

if TYPE_CHECKING:
    from PIL import Image

    from aimv2_mllm.evaluation.painter import Painter

MOST_SESSIONS = 8  # of which keys and values are held; the longest silent one is forgotten first
QUICKSTART = Path("runs/quickstart")
SHEET_SIZE = 224  # pixels


class Showroom:
    """Models by name, each loaded when it is first asked for, and sessions of their visitors."""

    def __init__(self, models: Sequence[str | Path]) -> None:
        """Of run folders every finished stage that talks; without any, the quickstart's."""
        if not models and not (QUICKSTART / RECIPE_FILE).is_file():
            raise UsageError(
                f"no model was given, and there is no {QUICKSTART}: make it with `make quickstart` "
                "(10 minutes on 2 cores), or give a run folder or a model folder"
            )
        self._folders: dict[str, Path] = {}
        for model in models or [QUICKSTART]:
            for name, folder in talking_folders(Path(model)).items():
                # Folders of one name are told apart by where they lie.
                if folder.resolve() not in self._folders.values():
                    key = name if name not in self._folders else str(folder)
                    self._folders[key] = folder.resolve()
        self._bots: dict[str, Chatbot] = {}
        self._painters: dict[str, Painter | None] = {}
        self._sessions: OrderedDict[tuple[str, str], ChatSession] = OrderedDict()
        self._loading, self._counting = threading.Lock(), threading.Lock()

    @property
    def names(self) -> list[str]:
        """The models, the first being what is offered first."""
        return list(self._folders)

    def bot(self, name: str) -> Chatbot:
        """The model called so; UsageError where there is none, or where it cannot be loaded."""
        folder = self._folder(name)
        with self._loading:
            if name not in self._bots:
                self._bots[name] = load_model(folder)
            return self._bots[name]

    def ask(
        self,
        visitor: str,
        name: str,
        shown: Sequence[Shown],
        *,
        system: str | None = None,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
    ) -> Reply:
        """What model `name` answers `visitor` to the conversation `shown`, in pieces."""
        messages, images = asked(shown, system)
        session = self._session(visitor, name)
        return session.stream(messages, images, max_new_tokens=max_new_tokens, sampling=sampling)

    def leave(self, visitor: str) -> None:
        """Give back the memory of all that `visitor` said."""
        with self._counting:
            for key in [key for key in self._sessions if key[0] == visitor]:
                self._sessions.pop(key).forget()
        heap.give_back()

    def knows_sheets(self, name: str) -> bool:
        """Whether it was trained on handwriting alone, so that held-out sheets are fair to it."""
        sources = (self.bot(name).data or {}).get("sources", ())
        return {source["kind"] for source in sources} == {"handwriting"}

    def longest_prefix(self, name: str) -> int:
        """How many patches of a picture the decoder of `painter` can be shown; 0 without one."""
        found = self._painter(name)
        return 0 if found is None else found.num_patches - 1

    def painter(self, name: str) -> "Painter":
        """What goes on with pictures for model `name`: the decoder of its run's pre-training.

        UsageError where there is none.
        """
        found = self._painter(name)
        if found is None:
            raise UsageError(
                f"{name} was not given with the run that pre-trained its tower, so there is no "
                "decoder that could paint: start the demo with a run folder that has both"
            )
        return found

    def _painter(self, name: str) -> "Painter | None":
        from aimv2_mllm.evaluation.painter import Painter

        run = self._folder(name).parents[1]
        with self._loading:
            if name not in self._painters:
                self._painters[name] = None
                if (run / RECIPE_FILE).is_file() and "pretrain" in _kinds(run):
                    self._painters[name] = Painter(pretrained_folder(run))
            return self._painters[name]

    def _folder(self, name: str) -> Path:
        if name not in self._folders:
            known = ", ".join(self._folders)
            raise UsageError(
                f"there is no model {name}, only {known}{nearest(name, self._folders)}"
            )
        return self._folders[name]

    def _session(self, visitor: str, name: str) -> ChatSession:
        bot, key = self.bot(name), (visitor, name)
        with self._counting:
            session = self._sessions.pop(key, None) or ChatSession(bot)
            self._sessions[key] = session
            while len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)[1].forget()
        return session


def _kinds(run: Path) -> set[str]:
    return {stage["kind"] for stage in stages_of(run).values()}


def sheet(seed: int) -> tuple["Image.Image", str]:
    """A held-out sheet and a question about it, both told by `seed`."""
    from PIL import Image

    scene = scenes.scene(seed, "heldout", 0)
    question = scenes.question(scene, scenes.generator(seed, "demo"))
    return Image.fromarray(scenes.render(scene, SHEET_SIZE)), question.text
