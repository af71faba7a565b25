"""A plugin for tests: what axolotl has no key for on a CPU. Listed as `cpu_plugin.CpuPlugin`."""

from axolotl.integrations.base import BasePlugin


class CpuPlugin(BasePlugin):
    def get_training_args(self, cfg):
        return {"use_cpu": True}  # transformers trains in bf16 on a CPU only when told so

    def load_datasets(self, cfg, preprocess=False):
        cfg.device_map = {"": "cpu"}  # in a distributed run axolotl asks for the GPU of the local rank
