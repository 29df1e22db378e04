"""Recipes: plain functions that return a job, with every option set. The command line overrides what it is told to."""

from __future__ import annotations

from quadric.recipes.an4 import an4
from quadric.recipes.digits import digits
from quadric.recipes.directory import directory
from quadric.recipes.fsdd import fsdd
from quadric.recipes.speechocean import speechocean

RECIPES = (digits, fsdd, speechocean, an4, directory)
"""Everything ``quadric train`` can be asked for."""

__all__ = ["RECIPES", "an4", "digits", "directory", "fsdd", "speechocean"]
