using Flux, PrunableFlux, Random

"A network with normally distributed weights and biases."
mlp(rng, widths...; σ = relu) = Chain((PrunableDense(Dense(randn(rng, Float32, o, i), randn(rng, Float32, o), σ))
                                       for (i, o) in zip(widths, widths[2:end]))...)

"Three classes in six dimensions that a small network learns to tell apart."
function blobs(rng; n = 240)
    labels = rand(rng, 1:3, n)
    x = randn(rng, Float32, 6, n) .+ 3 .* (labels' .== (1:6))
    return x, Flux.onehotbatch(labels, 1:3)
end

small(rng) = Chain(PrunableDense(6 => 12, relu; init = glorot(rng)), PrunableDense(12 => 3; init = glorot(rng)))
glorot(rng) = (dims...) -> Flux.glorot_uniform(rng, dims...)
