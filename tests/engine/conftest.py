"""Tiny checkpoints of every family, each written once a session."""

import pytest
import torch
import transformers
import zoo


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory):
    """name -> TinyCheckpoint, written when it is first asked for."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("zoo")
    written = {}

    def checkpoint(name: str) -> zoo.TinyCheckpoint:
        if name not in written:
            written[name] = zoo.write(name, folder / name)
        return written[name]

    return checkpoint


@pytest.fixture(scope="session", params=list(zoo.VARIANTS))
def tiny(request, tiny_checkpoints):
    """Every variant of every family in turn."""
    return tiny_checkpoints(request.param)
