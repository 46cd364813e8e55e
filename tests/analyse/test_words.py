"""What a file says of itself."""

import json

from veneer.analyse.words import facts_of, trigger_words_of


def test_the_most_frequent_tags_of_all_folders_are_trigger_words():
    tags = {"10_mine": {"mystyle": 20, "cat": 5, " hat ": 1}, "5_more": {"cat": 9, "": 4}}
    found = trigger_words_of({"ss_tag_frequency": json.dumps(tags)})
    assert list(found.items()) == [("mystyle", 20), ("cat", 14), ("hat", 1)]


def test_phrases_stand_first_and_a_list_of_them_is_read():
    many = {"10_x": {f"tag{i}": i for i in range(1, 40)}}
    metadata = {
        "modelspec.trigger_phrase": "in my style",
        "trigger_words": '["one", "two"]',
        "ss_tag_frequency": json.dumps(many),
    }
    found = trigger_words_of(metadata)
    assert list(found)[:4] == ["in my style", "one", "two", "tag39"]
    assert len(found) == 3 + 10


def test_damaged_metadata_says_nothing():
    for text in ("{", "[1]", '{"a": [1]}', '{"a": {"b": "c", "d": true}}', "null", "[" * 5000):
        assert trigger_words_of({"ss_tag_frequency": text}) == {}


def test_facts_have_plain_names_and_dates_are_dates():
    metadata = {
        "ss_training_finished_at": "1700000000.5",
        "modelspec.title": "My Style",
        "ss_output_name": "other",
        "ss_epoch": "4",
        "ss_steps": "1200",
        "ss_resolution": "(512, 512)",
        "ss_unet_lr": "None",
        "modelspec.license": "CC0-1.0",
    }
    assert facts_of(metadata) == {
        "title": "My Style",
        "licence": "CC0-1.0",
        "date": "2023-11-14 22:13 UTC",
        "resolution": "(512, 512)",
        "steps": "1200",
        "epochs": "4",
    }
