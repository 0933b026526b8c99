"""What `chordal compare --demo` shows: three small comparisons on the bundled models."""

from __future__ import annotations

from dataclasses import dataclass

from chordal.bench.compare import Contender


@dataclass(frozen=True)
class Scene:
    """One table.

    Attributes:
        title: Heading.
        model: Bundled model.
        contenders: Decoders beside the plain one.
        tasks: Graded tasks.
        num_prompts: Of each task.
        batch_size: Prompts decoded at once.
        repeats: Timed rounds.
        note: What to look at.
    """

    title: str
    model: str
    contenders: tuple[Contender, ...]
    tasks: tuple[str, ...]
    num_prompts: int
    batch_size: int
    repeats: int
    note: str


DEMO = (
    Scene(
        title="Autoregressive: copy drafts from the prompt, verify them in one pass",
        model="tiny-ar",
        contenders=(Contender("prompt_lookup"),),
        tasks=("rename", "insert_line", "copy", "arithmetic"),
        num_prompts=6,
        batch_size=1,
        repeats=3,
        note="prompt_lookup gives the same text in fewer passes, the more of it is copied, the fewer.",
    ),
    Scene(
        title="Masked diffusion: commit several positions a pass",
        model="tiny-mdm",
        contenders=(
            Contender("threshold", {"threshold": 0.9}),
            Contender("threshold", {"threshold": 0.5}),
            Contender("low_confidence", {"num_steps": 6}),
            Contender("low_confidence", {"num_steps": 2}),
        ),
        tasks=("copy", "sudoku", "shuffle", "replace_random", "latin"),
        num_prompts=16,
        batch_size=16,
        repeats=1,
        note=(
            "copy and sudoku have one right answer and keep their accuracy. The others have many, and "
            "positions committed in the same pass do not know of each other. (Tokens behind the end of an "
            "answer are not counted, hence less than 1 in the first row.)"
        ),
    ),
    Scene(
        title="Block diffusion: denoise a block, cache it, go on",
        model="tiny-block",
        contenders=(
            Contender("block_diffusion", {"threshold": 0.9}),
            Contender("block_diffusion", {"threshold": 0.5}),
            Contender("block_diffusion", {"num_steps": 2}),
        ),
        tasks=("copy", "sudoku", "shuffle", "replace_random", "latin"),
        num_prompts=16,
        batch_size=16,
        repeats=1,
        note="The same trade-off over an exact cache: a pass feeds a block, not the whole canvas.",
    ),
)
