"""What a built model is: its parameters by name, its modules, and the files of its folder.

One module a layout says all that is peculiar to it (``mlx_lm``, ``mlx_examples``) and stands in
``registry``, where everybody else finds it: a new layout is one module and one line there. Beside
them: ``model`` (a model by a layout's names), ``architecture`` (what the classes of one of the
``libraries`` make of a checkpoint, found out by ``asking`` a ``probe``, or why they refuse it,
``verdict``), ``sanitizer`` (has a library compute what is no plain tensor, by ``sanitizing``),
``llama_names`` and ``llama_tokenizer`` (from Meta's to Hugging Face's), ``slow_tokenizer``
(tokenizer.json of older files), ``importing`` (of libraries, by one thread at a time),
``weight_file`` and one module a format of weight files.

May import ``cache``, ``tasks.core``, ``tasks.tensors`` and ``tasks.checkpoints``.
"""
