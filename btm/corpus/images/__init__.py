"""Pictures as tokens: a vector-quantising tokenizer, one vocabulary with text, documents that hold both.

A domain that ``data.images`` names is read from JSON lines of two forms; paths are relative to the file's folder:

* a picture and its captions: ``{"image": "apple.png", "captions": ...}``, where ``captions`` (or ``caption``) is a
  string, a list, or an object nested as deep as one likes; every string in it is one caption and, with the picture,
  one document. Without captions the picture alone is a document;
* interleaved: ``{"text": "two fruits: <image> and <image>", "images": ["apple.png", "pear.png"]}``. A text without the
  word ``<image>`` gets its pictures before it or behind it.

Whether a caption stands before its picture or behind it is a hash of the document, so that a model learns to draw what
it reads and to describe what it sees.
"""
