"""For tests of decoders, plug-ins included: models made on the spot, and what every decoder must keep to.

- `conformance("my_decoder", {"num_draft": 3})` runs every check on a decoder.
- `tiny_model` is a seeded transformers model of two layers, with the real attention and cache.
- `ToyModel`, `TableModel`, `IdealModel` are functions written down, whose right answers are known.
- `chi_square` says how likely counts are under an exact law; `committed_law` is that of an acceptance rule.
"""

from chordal.testing.conformance import CHECKS as CHECKS
from chordal.testing.conformance import Subject as Subject
from chordal.testing.conformance import conformance as conformance
from chordal.testing.conformance import subjects as subjects
from chordal.testing.ideal import IdealModel as IdealModel
from chordal.testing.ideal import Simulation as Simulation
from chordal.testing.ideal import simulate as simulate
from chordal.testing.laws import chi_square as chi_square
from chordal.testing.laws import committed_law as committed_law
from chordal.testing.laws import sample_joint as sample_joint
from chordal.testing.laws import ways_to_draw as ways_to_draw
from chordal.testing.tiny import TINY_EOS as TINY_EOS
from chordal.testing.tiny import TINY_EXPERTS as TINY_EXPERTS
from chordal.testing.tiny import TINY_LOOPS as TINY_LOOPS
from chordal.testing.tiny import TINY_MASK as TINY_MASK
from chordal.testing.tiny import TINY_POISON as TINY_POISON
from chordal.testing.tiny import TINY_SLIDING_WINDOW as TINY_SLIDING_WINDOW
from chordal.testing.tiny import TINY_VOCAB as TINY_VOCAB
from chordal.testing.tiny import Alphabet as Alphabet
from chordal.testing.tiny import CountingModel as CountingModel
from chordal.testing.tiny import random_prompt as random_prompt
from chordal.testing.tiny import tiny_backbone as tiny_backbone
from chordal.testing.tiny import tiny_model as tiny_model
from chordal.testing.toys import UNSEEN as UNSEEN
from chordal.testing.toys import TableModel as TableModel
from chordal.testing.toys import ToyModel as ToyModel
