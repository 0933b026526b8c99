"""Train the byte-level BPE tokenizer that the bundled models share.

Every name, symbol, number up to 99 and word of the tasks becomes one token, together with the one
blank or line break before it; all other text falls back to bytes, so anything can be encoded.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chordal.bench.tasks import TASKS

PAD, MASK, END, USER, ASSISTANT = "<|pad|>", "<|mask|>", "<|end|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    f"{{{{ '{ASSISTANT}' + message['content'] + '{END}' }}}}"
    "{%- else -%}"
    f"{{{{ '{USER}' + message['content'] }}}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{ '{ASSISTANT}' }}}}{{%- endif -%}}"
)

# A word takes the one blank or line break before it along; an indented line break stands alone.
_PIECES = r"\n +|[ \n]?[A-Za-z_]+|[ \n]?[0-9]{1,2}|[ \n]?[^\sA-Za-z0-9_]+|\s"


def train_tokenizer(directory: Path, *, vocab_size: int = 1280, num_examples: int = 3000) -> None:
    """Train on examples of every task and save in the transformers layout.

    Args:
        directory: Where `tokenizer.json`, `tokenizer_config.json` and the chat template go.
        vocab_size: Upper bound on the number of tokens, special ones included.
        num_examples: Examples taken from each task.
    """
    tokenizer = Tokenizer(models.BPE())
    # The blank put before every text gives a word one form at the start of a line and inside it.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=4,
        show_progress=False,
        special_tokens=[PAD, MASK, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (
        text
        for task in TASKS.values()
        for instance in itertools.islice(task.instances(0, "train"), num_examples)
        for text in (instance.prompt, instance.answer)
    )
    numbers = (f"{n}\n{n}" for n in range(100) for _ in range(20))
    tokenizer.train_from_iterator(itertools.chain(texts, numbers), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        mask_token=MASK,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)
