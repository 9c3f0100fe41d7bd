"""The data of a run: examples that teach nothing are refused before the backbone loads."""

import pytest

import prefixtune as pt
from prefixtune.errors import ConfigError, DataError


def test_data_without_a_target_is_refused_before_the_backbone_loads(train, tmp_path, no_backbone_loads):
    bare = [pt.Example("a", ()), pt.Example("b", ())]
    with pytest.raises(DataError, match="the training data has 2 examples, and none has a target"):
        train(examples=bare)
    with pytest.raises(DataError, match="the development data has 2 examples, and none has a target"):
        train(dev_examples=bare)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"classifier": "head"}, {"label_words": "a=b"}])
def test_options_of_classification_are_refused_where_texts_are_generated(options, train, no_backbone_loads):
    with pytest.raises(ConfigError, match="records"):
        train(**options)
