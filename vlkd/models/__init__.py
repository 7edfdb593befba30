"""Teachers and students behind one interface; one file per family."""

from vlkd.compat import allow_torchvision_without_operators

# Before timm, open_clip or transformers are imported anywhere below.
allow_torchvision_without_operators()
