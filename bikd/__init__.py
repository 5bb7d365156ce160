__version__ = "0.1.0"


def __getattr__(name):  # `bikd.distill`, without loading torch for `import bikd`
    if name == "distill":
        from bikd.own_data import distill
        return distill
    raise AttributeError(f"module 'bikd' has no attribute {name!r}")
