"""CC12M: the images of pixparse/cc12m-wds with captions written by LLaVA-NeXT.

The captions are those of CaptionEmporium/conceptual-captions-cc12m-llavanext. Both data sets are on
the Hugging Face hub. Each tar of images becomes one shard.
"""
from functools import partial

from fusedit import FuseDiTError
from fusedit_lib.data import packing
from fusedit_lib.data.captions import CaptionTable, WithCaptions
from fusedit_lib.data.filters import select_captions
from fusedit_lib.data.images import Skip, image_rules
from fusedit_lib.data.items import (
    Item,
    digest,
    make_sample,
    output_settings,
    require_exists,
)
from fusedit_lib.data.layout import LayoutError, find_image
from fusedit_lib.data.shards import ends_well, read_sample, sample_offsets


class TarItems:
    """Iterates over the samples of a tar, each with KEY.jpg (png, webp), KEY.txt and KEY.json.

    If the tar is damaged or truncated, one extra item names the byte where the damage starts.
    """

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        offsets = sample_offsets(self.path)
        with open(self.path, "rb") as tar:
            for i in range(len(offsets) - 1):
                key, files = read_sample(tar, offsets, i)
                key = key.rpartition("/")[2]
                try:
                    image = files[find_image(files)]
                except LayoutError as e:
                    image = Skip(e.kind)
                alt_text = files.get("txt", b"").decode(errors="replace")
                yield Item(key, image, dict(original_caption=alt_text), key)
            end = offsets[-1]
            if not ends_well(tar, end):
                name = f"{self.path.name} from byte {end}"
                yield Item(name, Skip("damaged tar"), captions={})


def cc12m_sample(rules, item):
    """The sample of an Item. Raises Skip, for example if it has no synthetic caption."""
    has_image = not isinstance(item.image, Skip)
    if has_image:
        synthetic = item.captions["synthetic_caption"]
        if not synthetic:
            raise Skip("no synthetic caption")
        select_captions(dict(synthetic_caption=synthetic), rules)       # the alt text is not enough
    return make_sample(rules, item)


def cc12m(args):
    """Run `prepare_data.py cc12m`."""
    require_exists(args.images, args.captions)
    tars = sorted(args.images.rglob("*.tar"))
    if not tars:
        raise FuseDiTError(f"no *.tar in {args.images}: give the folder of the cc12m-wds tars")
    names_and_sizes = digest((tar.name, tar.stat().st_size) for tar in tars)
    if not packing.begin(args, **output_settings(args, tars=names_and_sizes)):
        return

    captions = CaptionTable.from_files(args.captions, args.key_column, args.caption_column,
                                       args.out / ".progress" / "captions.duckdb")
    jobs = [WithCaptions(TarItems(tar), captions) for tar in tars]
    make = partial(cc12m_sample, image_rules(args))
    packing.pack(args, "cc12m", jobs, make, captions=captions.counts())
