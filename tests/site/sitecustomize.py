"""Puts the tests' small backbones into the table, in every process that has this folder on its PYTHONPATH.

Python imports a module of this name when it starts, in the processes that torchrun starts, too.
"""
from backbones import BACKBONES, Backbone

BACKBONES["tiny"] = Backbone("tiny_network.Tiny")
BACKBONES["tiny_d8"] = Backbone("tiny_network.TinyD8")
BACKBONES["tiny_plain"] = Backbone("tiny_network.TinyPlain")
