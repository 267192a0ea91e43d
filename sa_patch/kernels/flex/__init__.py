"""Backend `flex`: torch's FlexAttention, compiled, over lists of key blocks."""
