{
  "algorithm": "Ed25519",
  "key": "e8949ff377b39979",
  "signature": "dKru3xY3M7j+NgSgdESiF+rwmFGGLgWEZhHOZb6hBtI/BnkVQ6IRYu+Giu2/d4ppwc1vtty2j67SieV/Xdb/Ag=="
}
