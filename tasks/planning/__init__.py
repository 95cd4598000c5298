"""planning: decides what is to be done, and moves no tensor.

``plan`` makes nodes of a target's stages, ``bundle`` says what build/TARGET will hold, ``sizes``
how many bytes move, ``forecast`` what a run would do, ``lockfile`` what models.lock allows. May
import stages and all below; execution carries out what is decided here.
"""
