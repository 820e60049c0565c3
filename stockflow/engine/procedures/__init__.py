"""Procedures: how each kind of rule gets from the elements of a unit to its result. A file per kind."""

from stockflow.engine.procedures import copy, elementwise, linear
from stockflow.engine.procedures.proceeding import Procedure
from stockflow.methods.protocol import Copy, Elementwise, Linear

PROCEDURES: dict[type, Procedure] = {Copy: copy.decide, Linear: linear.decide, Elementwise: elementwise.decide}
"""By the type of a method's rule."""
