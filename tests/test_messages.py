"""Tables, lists that end early, and many layers with one reason in one line."""

from fastlora.runtime.messages import by_reason, some, table


def test_a_table_is_aligned_and_ends_where_its_text_does():
    assert table([("layer", "rank", "why"), ("a.long.name", 8, ""), ("b", 16, "wide")]).split("\n") == [
        "layer        rank  why",
        "a.long.name  8",
        "b            16    wide",
    ]


def test_layers_with_one_reason_are_one_line():
    pairs = [("head", "tied")] + [(f"layers.{i}", "hooked") for i in (0, 1, 2, 10, 11)]
    assert by_reason(pairs) == ["layers.0, layers.1, layers.2 and 2 more: hooked", "head: tied"]
    assert by_reason([]) == []


def test_a_list_says_how_many_more_there_are():
    assert some("gfedcba") == "a, b, c, d, e and 2 more"
    assert some(["b", "a"]) == "a, b"
