import pytest

from plait.errors import BadSetup
from plait.model import PUBLISHED_SHAPES, published_spec


def test_published_shapes_have_the_sizes_that_were_published() -> None:
    opt = published_spec("opt-13b")
    # Kwon et al. 2023, section 1: 800 KB of keys and values for a token of OPT-13B in 16 bits.
    assert opt.kv_elements_per_token(opt.all_blocks) * 2 == 819_200
    assert len(published_spec("llama-3-70b").blocks) == 80
    for name in PUBLISHED_SHAPES:
        spec = published_spec(name)
        assert spec.hidden == spec.blocks[0].attention.heads * spec.blocks[0].attention.head_dim


def test_an_unknown_shape_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadSetup, match=r"'opt-14b'.*opt-13b"):
        published_spec("opt-14b")
