{
  "algorithm": "Ed25519",
  "key": "e8949ff377b39979",
  "signature": "zORDeTQjdGvri/esY6RQagWA0E7esfP9317qfW2RtrCJB+hwzgF/QKorQJBq4Oki1Ne+XlUhuylfmLSOlEt2Bw=="
}
