"""Captions of pictures: CNN-LSTM, CNN-attention-LSTM and CNN-transformer, trained and measured like the papers."""
