"""The run-time type checker of the shape hook: beartype, with an int taken for a float."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
