"""Text: corpora, tokenisers, windows of tokens."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.text.corpus import END_OF_TEXT as END_OF_TEXT
    from loopscope.text.corpus import SUFFIXES as SUFFIXES
    from loopscope.text.corpus import Corpus as Corpus
    from loopscope.text.corpus import Document as Document
    from loopscope.text.corpus import check_file as check_file
    from loopscope.text.corpus import load_corpus as load_corpus
    from loopscope.text.corpus import train_tokenizer as train_tokenizer
    from loopscope.text.foreign_tokenizers import ForeignTokenizer as ForeignTokenizer
    from loopscope.text.foreign_tokenizers import tokenizer_stamp as tokenizer_stamp
    from loopscope.text.foreign_tokenizers import usable_tokenizer as usable_tokenizer
    from loopscope.text.foreign_tokenizers import without_limits as without_limits
    from loopscope.text.token_classes import BUILT_IN_LABELS as BUILT_IN_LABELS
    from loopscope.text.token_classes import CLASS_LABELS as CLASS_LABELS
    from loopscope.text.token_classes import CLASSES as CLASSES
    from loopscope.text.token_classes import is_python as is_python
    from loopscope.text.token_classes import token_labels as token_labels
    from loopscope.text.token_classes import token_pieces as token_pieces
    from loopscope.text.token_classes import token_texts as token_texts
    from loopscope.text.windows import Samples as Samples
    from loopscope.text.windows import load_samples as load_samples
    from loopscope.text.windows import one_text as one_text

__getattr__, __dir__, __all__ = lazy(__name__)
