"""DeepSpeed between processes on a CPU, for tests: a plugin of axolotl, listed as `deepspeed_on_cpu.DeepSpeedOnCpu`.

accelerate starts it on GPUs alone; gloo does not write into the views that ZeRO keeps of its weights while autograd
looks; and its own reduction through shared memory would have to be compiled first.
"""

import deepspeed.comm.torch
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def prepare():
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    DeepSpeedZeroOptimizer.step = torch.no_grad()(DeepSpeedZeroOptimizer.step)
    deepspeed.comm.torch.build_shm_op = lambda: None


class DeepSpeedOnCpu(BasePlugin):
    def register(self, cfg):
        prepare()

    def load_datasets(self, cfg, preprocess=False):
        cfg.device_map = {"": "cpu"}  # in a distributed run axolotl asks for the GPU of the local rank
