"""From a teacher's tokenizer to the student's: nested, by bytes, by spans of text."""
