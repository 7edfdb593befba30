"""placeholder"""
from pathlib import Path
class Record: pass
def read_captions_file(path: Path): raise NotImplementedError
def read_karpathy(path: Path): raise NotImplementedError
