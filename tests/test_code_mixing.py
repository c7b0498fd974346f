"""Dictionaries and code-mixing with them, against a slow reference and examples worked by hand."""

import subprocess
import sys
from collections import Counter

import pytest

from finetune.strategies.code_mixing import Dictionary, mix_text, open_dictionaries, read_dictionary
from raylib.errors import UserError
from raylib.randomness import uniform

# ---- dictionaries


def test_muse_dictionary_lines_are_read(tmp_path):
    path = tmp_path / "de2.txt"
    path.write_text(
        "\ufeffDog Hund\ncat\tKatze\ncat\tKater\r\ncat Katze\npolar bear\tEisbär\nglass\tGlas\tein Glas\n"
        "is es ist\n  owl \t  Eule  \nPOLAR  BEAR CUB\tEisbärjunges\n" + "x y\n" * 5,
        encoding="utf-8",
    )
    read = read_dictionary(path, "de")
    assert read.entries == {
        "dog": ("Hund",),
        "cat": ("Katze", "Kater"),
        "polar bear": ("Eisbär",),
        "glass": ("Glas", "ein Glas"),
        "is": ("es ist",),
        "owl": ("Eule",),
        "polar bear cub": ("Eisbärjunges",),
        "x": ("y",),
    }
    assert (read.max_words, read.num_lines, read.num_odd) == (3, 14, 0)


def test_dictionary_malformed_lines_are_counted_then_refused(tmp_path):
    odd = [b"alone\n", b"\n", b"caf\xe9 Kaffee\n", b"word\t\n", b"\tWort\n"]
    good = [b"dog Hund\n"] * 45
    (tmp_path / "de2.txt").write_bytes(b"".join(good[:3] + odd + good[3:]))
    read, report = open_dictionaries(tmp_path, ["de"])
    assert (read["de"].num_odd, read["de"].num_lines, list(read["de"].entries)) == (5, 50, ["dog"])
    assert report == "English words with translations: de 1; 5 of 50 lines left out"
    (tmp_path / "de2.txt").write_bytes(b"".join(good[:3] + odd + good[4:]))
    with pytest.raises(UserError, match=r"de2\.txt: line 4 is the first of 5 \(of 49\)"):
        open_dictionaries(tmp_path, ["de"])
    (tmp_path / "fr2.txt").write_bytes(b"")
    with pytest.raises(UserError, match="fr2.txt: not one line is"):
        read_dictionary(tmp_path / "fr2.txt", "fr")


def test_dictionary_missing_language_lists_available_ones(tmp_path):
    (tmp_path / "de2.txt").write_text("dog Hund\n")
    (tmp_path / "en-ru.txt").write_text("dog собака\n")
    assert set(open_dictionaries(tmp_path, ["ru", "de"])[0]) == {"de", "ru"}
    with pytest.raises(UserError, match=r"no dictionary 'ko2\.txt'; there are: de, ru"):
        open_dictionaries(tmp_path, ["de", "ko"])
    with pytest.raises(UserError, match="there are: none"):
        open_dictionaries(tmp_path / "nowhere", ["ko"])
    with pytest.raises(UserError, match="no language"):
        open_dictionaries(tmp_path, [])


def test_dictionaries_of_scenes_cover_labels(scenes):
    opened, _ = open_dictionaries(scenes / "dictionaries", ["de", "zh"])
    assert opened["de"].num_odd == 0 and opened["de"].max_words > 1
    assert opened["de"].entries["guide dog"] == ("Blindenhund",) and opened["zh"].entries["dog"] == ("狗",)


# ---- code-mixing


def dictionary(language, **entries):
    entries = {source.replace("_", " "): found for source, found in entries.items()}
    return Dictionary(language, entries, max(source.count(" ") + 1 for source in entries), len(entries), 0)


DE = dictionary("de", dog=("Hund",), polar_bear=("Eisbär",), bear=("Bär",), the=("der", "die", "das"))
RU = dictionary("ru", dog=("собака",))


def always(text, dictionaries, *keys):
    return mix_text(text, dictionaries, 1.0, 1.0, *(keys or (0,)))


@pytest.mark.parametrize(
    ("text", "mixed"),
    [
        ("A Dog?", "A Hund?"),
        ("“DOG”, dog's (dog)...", "“Hund”, dog's (Hund)..."),
        ("polar bear, bear", "Eisbär, Bär"),  # the longest match first
        ("“Polar  Bear”?", "“Eisbär”?"),
        ("polar, bear", "polar, Bär"),
        ("polar (bear)", "polar (Bär)"),
        ("a polar", "a polar"),
        ("- ? dog", "- ? Hund"),
        ("", ""),
        (" ", " "),
    ],
)
def test_code_mixing_equals_worked_example(text, mixed):
    assert always(text, {"de": DE}) == mixed


def test_code_mixing_draws_language_before_lookup():
    """Half of the bears stay although German has them: Russian was drawn, and lacks them."""
    texts = Counter(always("dog bear", {"de": DE, "ru": RU}, 5, i) for i in range(4000))
    assert set(texts) == {"Hund Bär", "Hund bear", "собака Bär", "собака bear"}
    assert all(abs(count - 1000) < 120 for count in texts.values())


def test_code_mixing_shares_match_settings():
    words, n = "the dog the polar bear sleeps", 3000
    mixed = [mix_text(words, {"de": DE}, 0.5, 0.6, 7, 0, f"item{i}") for i in range(n)]
    touched = [text for text in mixed if text != words]
    assert len(touched) / n == pytest.approx(0.5 * (1 - 0.4**4), abs=0.03)
    assert sum("Eisbär" in text for text in mixed) / n == pytest.approx(
        0.3, abs=0.03
    )  # an entry of two words is one word
    assert not any("polar Bär" in text for text in mixed)
    articles = Counter(text.split()[0] for text in touched)
    assert all(articles[article] / n == pytest.approx(0.1, abs=0.02) for article in ("der", "die", "das"))
    assert mix_text(words, {"de": DE}, 0.0, 1.0, 7) == mix_text(words, {"de": DE}, 1.0, 0.0, 7) == words


def test_code_mixing_equals_slow_reference():
    """Word by word, each draw by itself."""
    both = {"ru": RU, "de": DE}
    text = "Is the dog near the polar bear?"
    for item in range(50):
        words, expected, i = text.split(), [], 0
        while i < len(words):
            language = ["de", "ru"][int(uniform(1, 2, item, 2, i) * 2)]
            replaced = uniform(1, 2, item, 1, i) < 0.7
            for count in (2, 1):
                key = " ".join(words[i : i + count]).lower().rstrip("?")
                found = both[language].entries.get(key) if len(words) - i >= count else None
                if found:
                    break
            if found and replaced:
                tail = "?" if words[i + count - 1].endswith("?") else ""
                expected.append(found[int(uniform(1, 2, item, 3, i) * len(found))] + tail)
            else:
                expected += words[i : i + count]
            i += count
        assert mix_text(text, both, 1.0, 0.7, 1, 2, item) == " ".join(expected)


def test_code_mixing_differs_by_epoch_and_agrees_across_processes():
    text = "the dog the dog the dog the dog"
    keys = [(0, epoch, "item7") for epoch in range(6)]
    mixed = [mix_text(text, {"ru": RU, "de": DE}, 1.0, 0.9, *key) for key in keys]
    assert len(set(mixed)) == 6
    assert mixed == [
        mix_text(text, {"de": DE, "ru": RU}, 1.0, 0.9, *key) for key in keys
    ]  # in any order of the languages
    code = (
        "from tests.test_code_mixing import *; "
        "print(mix_text('the dog the dog the dog the dog', {'de': DE}, 1.0, 0.9, 0, 1, 'item7'))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == mix_text(text, {"de": DE}, 1.0, 0.9, 0, 1, "item7")
