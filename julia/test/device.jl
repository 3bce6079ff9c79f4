using Flux, JLArrays, PrunableFlux, Random, Test
import Adapt

JLArrays.allowscalar(false)

@testset "a pruned network trains on a device without scalar indexing: $M" for M in (Matrix{Bool}, BitMatrix)
    host = Chain(PrunableDense(Dense(6 => 8, relu), fill!(M(undef, 8, 6), true)), PrunableDense(8 => 3))
    model = fmap(x -> x isa AbstractArray ? Adapt.adapt(JLArray, x) : x, host; exclude = x -> x isa AbstractArray)
    @test model[1].mask isa JLArray{Bool} && model[1].dense.weight isa JLArray
    x = randn(Float32, 6, 20)
    y = Flux.onehotbatch(rand(1:3, 20), 1:3)
    dx, dy = JLArray(x), JLArray(Matrix{Float32}(y))
    @test Array(model(dx)) ≈ host(x)

    foreach(m -> prune!(m, Magnitude(); sparsity = 0.5), (model, host))
    @test [Array(l.mask) for l in model] == [Matrix(l.mask) for l in host]
    @test Array(model(dx)) ≈ host(x)
    @test sparsity(model) == sparsity(host)
    @test occursin("density=", repr(model[1]))

    opt, host_opt = Flux.setup(Adam(0.01), model), Flux.setup(Adam(0.01), host)
    losses = train_masked!(Flux.logitcrossentropy, model, [(dx, dy) for _ in 1:5], opt)
    @test losses ≈ train_masked!(Flux.logitcrossentropy, host, [(x, y) for _ in 1:5], host_opt)
    prune!(model, Magnitude(); sparsity = 0.8, opt)
    prune!(host, Magnitude(); sparsity = 0.8, opt = host_opt)
    train_masked!(Flux.logitcrossentropy, model, [(dx, dy) for _ in 1:5], opt)
    train_masked!(Flux.logitcrossentropy, host, [(x, y) for _ in 1:5], host_opt)
    for (device, cpu) in zip(model, host)
        @test Array(device.dense.weight) ≈ cpu.dense.weight
        @test all(iszero, Array(device.dense.weight)[.!Array(device.mask)])
    end
    model[1].dense.weight .= 1
    model(dx)
    @test all(iszero, Array(model[1].dense.weight)[.!Array(model[1].mask)])
    PrunableFlux.restart!(Reinitialize(), model, deepcopy(model), Xoshiro(1))
    @test evaluate(model, [(dx, dy)]).accuracy <= 1
end
