"""Recipes: plain functions that return a job, with every option set. The command line overrides what it is told to."""

from __future__ import annotations

from quadric.recipes.an4 import an4
from quadric.recipes.autoencoder import autoencoder
from quadric.recipes.cifar10 import cifar10
from quadric.recipes.citations import citations
from quadric.recipes.digits import digits
from quadric.recipes.directory import directory
from quadric.recipes.fsdd import fsdd
from quadric.recipes.speechocean import speechocean

RECIPES = (digits, fsdd, speechocean, an4, directory, autoencoder, cifar10, citations)
"""Everything ``quadric train`` can be asked for."""

__all__ = [
    "RECIPES",
    "an4",
    "autoencoder",
    "cifar10",
    "citations",
    "digits",
    "directory",
    "fsdd",
    "speechocean",
]
