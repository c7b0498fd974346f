"""Distillation across languages (cViL, paper 3): a teacher reads English, a student another language, about
the same picture.

    1. `finetune.strategies.distillation` gives each training example its English text, and mixes English
       words into its own.
    2. `inputs` says, batch by batch, what the teacher reads and which tokens of student and teacher are to
       come together.
    3. `teacher` runs beside the student, or `stored` reads what it made before.
    4. `objective` draws the student's states to the teacher's (`terms`).

`alignments` and `mixing` are about words that translate each other; `aligner` finds them (`python -m
finetune.distillation`).
"""
