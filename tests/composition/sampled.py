"""What a model's target may take."""


class TakesDtype:
    def __init__(self, size=1, dtype=None): ...


class TakesTorchDtype:
    def __init__(self, torch_dtype: str | None = None, **kwargs): ...


class TakesAnything:
    def __init__(self, **kwargs): ...


class TakesNeither:
    def __init__(self, size=1): ...


class TakesObjectsOnly:
    def __init__(self, dtype: "torch.dtype" = None): ...  # noqa: F821 - not imported: no test needs it


class TakesObjectsOrNames:
    def __init__(self, dtype: "str | torch.dtype" = None): ...  # noqa: F821
