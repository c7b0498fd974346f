"""Account of a folder of image_text tars: which members are its images, and what else lies in it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from raylib.data.samples import has_captions, is_image, is_plain_image
from raylib.data.tars import TarScan
from raylib.errors import UserError

NAMED = 8  # extensions that a line names


class Account:
    """Counts over all tars of a folder.

    Args:
        listed: extensions of the images that the user asks for; None takes the plain ones ("jpg",
            "input.jpg"), of which a sample may have one.
    """

    def __init__(self, listed: Sequence[str] | None = None):
        self.listed = sorted({extension.lower().lstrip(".") for extension in listed}) if listed else None
        self.kinds: Counter[frozenset[str]] = Counter()  # samples by the extensions that they have
        self.skipped, self.notes = Counter(), Counter()

    def add(self, scan: TarScan) -> None:
        """Count a tar.

        Raises:
            UserError: a sample has several plain images, and nothing says which is meant.
        """
        self.skipped += scan.skipped
        self.notes += scan.notes
        for key, members in scan.samples.items():
            images = sorted(filter(is_plain_image, members))
            if len(images) > 1 and not self.listed:
                raise UserError(
                    f"{scan.path}: sample {key} has several images, {', '.join(images)}; say which is meant, "
                    f"such as --images {images[0]}, or list all of them where they are drawings of one thing"
                )
            self.kinds[frozenset(members)] += 1

    def count(self, extensions: Iterable[str]) -> dict[str, int]:
        """Count the samples that have a member of each extension."""
        return {
            name: n for name in extensions if (n := sum(c for kind, c in self.kinds.items() if name in kind))
        }

    def choose_images(self, folder: Path) -> list[str]:
        """Extensions of the members that are images, sorted; errors name `folder`.

        Raises:
            UserError: none of what is listed is there; nothing is listed and several could be meant.
        """
        every = sorted(set().union(*self.kinds))
        if self.listed:
            if missing := [name for name in self.listed if name not in every]:
                raise UserError(f"{folder}: no member ends in .{missing[0]}; there are: {_list(every)}")
            return self.listed
        plain, others = list(filter(is_plain_image, every)), list(filter(is_image, every))
        if not plain and len(others) > 1:
            raise UserError(
                f"{folder}: no member is plainly the image; say which are, of: --images {_list(others, ' ')} "
                "(a key ends at the first dot of a name; where keys have dots, write the tars anew)"
            )
        return plain or others

    def lines(self, images: Sequence[str] | None) -> list[str]:
        """Return what to print of it; `images` as chosen, None for packed text."""
        every, notes = sorted(set().union(*self.kinds)), Counter(self.notes)
        if images is not None:
            bare = sum(n for kind, n in self.kinds.items() if not kind & set(images))
            mute = sum(n for kind, n in self.kinds.items() if not has_captions(kind))
            notes |= +Counter({"samples without an image": bare, "samples without captions": mute})
        others = self.count(name for name in every if name not in (images or ()))
        parts = {
            "images": self.count(images or ()),
            "other members": others,
            "skipped": self.skipped,
            "note": notes,
        }
        return [
            f"{name}: {_list([f'{n} {what}' for what, n in found.items()])}"
            for name, found in parts.items()
            if found
        ]


def _list(names: Sequence[str], comma: str = ", ") -> str:
    return comma.join(names[:NAMED]) + (f"{comma}... ({len(names)})" if len(names) > NAMED else "")
