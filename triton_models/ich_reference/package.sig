{
  "algorithm": "Ed25519",
  "key": "49807d3b1e5d2611",
  "signature": "d6CMPML0b89R21Fti6vwmsiqPE0aBNV88D+6hR3VPn/7hRLbURNcA8oDLwVj6ZWdUOywA+4U9FE2Fmvrd6HADA=="
}
