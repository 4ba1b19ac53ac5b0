"""From a teacher's tokenizer to the student's: the same, nested, byte prefixes."""
