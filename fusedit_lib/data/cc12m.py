"""TODO."""
from functools import partial

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.captions import Captioned, Captions
from fusedit_lib.data.images import Skip, rules
from fusedit_lib.data.items import Item, digest, item_sample, need, said
from fusedit_lib.data.shards import ends_well, read_sample, sample_offsets


class TarSamples:
    """The samples KEY.jpg, KEY.txt, KEY.json of a tar as items; what is damaged, as one more."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        offsets = sample_offsets(self.path)
        with open(self.path, "rb") as tar:
            for i in range(len(offsets) - 1):
                key, files = read_sample(tar, offsets, i)
                yield Item(key, files.get("jpg", Skip("no image")), dict(
                    original_caption=files.get("txt", b"").decode(errors="replace")), key)
            if not ends_well(tar, offsets[-1]):
                yield Item(f"{self.path.name} from byte {offsets[-1]}", Skip("damaged tar"), {}, "")


def cc12m_sample(how, item):
    if not isinstance(item.image, Skip) and not item.captions["synthetic_caption"]:
        raise Skip("no synthetic caption")
    return item_sample(how, item)


def cc12m(args):
    need(args.images, args.captions)
    tars = sorted(args.images.rglob("*.tar"))
    if not tars:
        raise FuseDiTError(f"no *.tar in {args.images}, which must be a folder of cc12m-wds's")
    if not packing.begin(args, **said(args, tars=digest((p.name, p.stat().st_size)
                                                        for p in tars))):
        return
    captions = Captions.of_files(args.captions, args.key_column, args.caption_column,
                                 args.out / ".progress" / "captions.duckdb")
    packing.pack(args, "cc12m", [Captioned(TarSamples(path), captions) for path in tars],
                 partial(cc12m_sample, rules(args)), captions=captions.counts())
