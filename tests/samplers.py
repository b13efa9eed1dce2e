"""Samplers as users write them."""

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A permutation of all records, another one in every epoch; counts how often it was asked."""

    def __init__(self, num_records, *, seed=0):
        self.num_records, self.seed = num_records, seed
        self.epoch = self.asked = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.num_records

    def __iter__(self):
        self.asked += 1
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.num_records, generator=generator).tolist())
