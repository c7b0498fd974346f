"""Where pictures and region features lie: read by id, in any order, from any process."""

from finetune.stores.pictures import PictureStore, open_pictures
from finetune.stores.records import Regions
from finetune.stores.regions import RegionStore, locations, open_regions

__all__ = ["PictureStore", "RegionStore", "Regions", "locations", "open_pictures", "open_regions"]
