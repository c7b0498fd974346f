"""Distillation across languages (cViL, paper 3): a teacher reads English, a student another language, about
the same image.

    1. `strategy` gives each training example its English text, and mixes English words into its own
       (`word_alignments`; `python -m finetune.strategies.distillation` finds them).
    2. `pairs` says, batch by batch, what the teacher reads and which tokens of student and teacher are to
       come together.
    3. `teacher` runs beside the student, or what it made before is read back.
    4. `strategy` draws the student's states to the teacher's, as terms of the loss.
"""
