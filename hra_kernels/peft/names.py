"""Names of modules and tensors as files have them: without what wrappers around a module put in between."""

_COMPILED = "_orig_mod"  # torch.compile(block) in the place of a block


def plain_name(name: str) -> str:
    """The name that the module or tensor has in a model where nothing is wrapped."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)
