"""A reward and a data transform for GRPO runs in tests."""


def length(completions, **kwargs):
    return [float(len(str(completion))) for completion in completions]


def transform(cfg, *args, **kwargs):
    def transform_fn(example, tokenizer=None):
        return {"prompt": example["messages"][:-1]}

    return transform_fn, {"remove_columns": ["messages"]}
