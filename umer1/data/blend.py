"""Several data files as one: pairs are numbered through, data sets of different files are different ones."""

from typing import Any

import numpy as np

from umer1.data.bad_samples import BadSample
from umer1.data.dataset import RecordFile


class Blend:
    """What a loader needs of a RecordFile, over several of them; what is wrong with a pair names its file.

    A data set that two files have under one name is two, called `name (file)`: a block of a batch is of one file.
    """

    def __init__(self, files: list[RecordFile]):
        self.files = files
        self.starts = np.cumsum([0, *map(len, files)])
        self.file_ids: list[int] = []  # of each of `names`
        counts = [name for file in files for name in file.names]
        names, ids, offset = [], [], 0
        for number, file in enumerate(files):
            for name in file.names:
                names.append(f"{name} ({file.path.name})" if counts.count(name) > 1 else name)
            self.file_ids += [number] * len(file.names)
            ids.append(file.name_ids + offset)
            offset += len(file.names)
        if len(set(names)) < len(names):  # files of one name in several folders
            names = [f"{name} [{self.file_ids[place]}]" for place, name in enumerate(names)]
        self.names = tuple(names)
        self.name_ids = np.concatenate(ids)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def processor(self) -> Any:
        return self.files[0].processor

    @property
    def contents(self) -> list[tuple[str, str]]:
        """Of each file, as its own `contents` has it."""
        return [entry for file in self.files for entry in file.contents]

    def dataset_name(self, index: int) -> str:
        return self.names[self.name_ids[index]]

    def __getitem__(self, index: int) -> Any:
        """The pair of the file it is in, with its number here; raises BadSample."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, place = self.files[number], index - int(self.starts[number])
        try:
            pair = file[place]
        except BadSample as error:
            raise BadSample(error.cause, f"{file.path}, record {place}: {error.detail}") from None
        pair.index = index
        return pair

    def close(self) -> None:
        for file in self.files:
            file.close()
