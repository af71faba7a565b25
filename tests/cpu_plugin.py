"""A plugin for tests: transformers trains in bf16 on a CPU only when told so, and axolotl has no key for it."""

from axolotl.integrations.base import BasePlugin


class CpuPlugin(BasePlugin):
    def get_training_args(self, cfg):
        return {"use_cpu": True}
